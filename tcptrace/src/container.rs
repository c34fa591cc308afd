//! Which container, by the path of a cgroup.

/// The id or name of the container that a cgroup path belongs to, by the forms that container
/// engines give it. Of containers inside each other it is the innermost.
///
/// | engine | form |
/// |---|---|
/// | docker, podman, containerd, CRI-O | an id of 64 hex digits: `docker-ID.scope`, `libpod-ID.scope`, `cri-containerd-ID.scope`, `crio-ID.scope` under systemd; a bare `ID` or `libpod-ID` under cgroupfs; `SLICE:cri-containerd:ID` where the two are mixed |
/// | LXC | `lxc.payload.NAME`, `lxc.payload/NAME`, `lxc/NAME` |
/// | systemd-nspawn | `machine-NAME.scope`, `systemd-nspawn@NAME.service` |
///
/// An engine's monitor (`crio-conmon-ID.scope`, `lxc.monitor.NAME`) runs on the host, and so do
/// libvirt's virtual machines (`machine-qemu…`): none of them is a container.
#[must_use]
pub fn of_cgroup(path: &str) -> Option<String> {
    // A loop: a path that a recording claims can have any number of parts.
    let mut rest = path;
    while let Some((parent, name)) = rest.rsplit_once('/') {
        let folder = parent.rsplit('/').next().unwrap_or_default();
        let found = engine_id(name)
            .or_else(|| lxc_name(folder, name))
            .map(str::to_owned)
            .or_else(|| machine_name(name));
        if found.is_some() {
            return found;
        }
        rest = parent;
    }
    None
}

/// Whether the last part of a cgroup's path is a container's own scope or service, not one that
/// systemd would run anyway.
pub(crate) fn is_container(name: &str) -> bool {
    engine_id(name).is_some() || machine_name(name).is_some()
}

fn engine_id(name: &str) -> Option<&str> {
    let name = name.strip_suffix(".scope").unwrap_or(name);
    let (prefix, id) = name.rsplit_once(['-', ':']).unwrap_or(("", name));
    let is_id = id.len() == 64 && id.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    (is_id && !prefix.ends_with("conmon")).then_some(id)
}

fn lxc_name<'a>(folder: &str, name: &'a str) -> Option<&'a str> {
    let container = match folder {
        "lxc" | "lxc.payload" => Some(name),
        _ => name.strip_prefix("lxc.payload."),
    };
    container.filter(|name| !name.is_empty())
}

fn machine_name(name: &str) -> Option<String> {
    let scope = || name.strip_prefix("machine-")?.strip_suffix(".scope");
    let service = || {
        name.strip_prefix("systemd-nspawn@")?
            .strip_suffix(".service")
    };
    let machine = systemd_unescape(scope().or_else(service)?);
    (!machine.is_empty() && !machine.starts_with("qemu-")).then_some(machine)
}

/// Undoes the `\x2d` of systemd-escape(1) in a unit's name. The dash that stands for a slash stays:
/// no machine has a slash in its name.
fn systemd_unescape(name: &str) -> String {
    let mut plain = Vec::with_capacity(name.len());
    let mut rest = name.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let escaped = match after {
            [b'x', high, low, ..] if byte == b'\\' => hex(*high).zip(hex(*low)),
            _ => None,
        };
        match escaped {
            Some((high, low)) => {
                plain.push(high << 4 | low);
                rest = &after[3..];
            }
            None => {
                plain.push(byte);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&plain).into_owned()
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).map(|value| value as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "4f5ed1b8f40f2ae4e4bc4c1e4c3ba0bc2b0ad8bb9b0bd1ff4f9e1f8b4f2a7c31";
    const OUTER: &str = "00a1b2c3d4e5f60718293a4b5c6d7e8f00a1b2c3d4e5f60718293a4b5c6d7e8f";

    #[test]
    fn a_container_is_told_by_the_path_of_its_cgroup() {
        // OUTER and ID stand for two ids.
        for (path, expected) in [
            // docker: systemd driver, cgroupfs driver, a cgroup made inside
            ("/system.slice/docker-ID.scope", Some(ID)),
            ("/docker/ID", Some(ID)),
            ("/docker/ID/init.scope", Some(ID)),
            // Kubernetes with containerd, CRI-O, docker; systemd, cgroupfs, and the two mixed
            (
                "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod8b1a5f5e_0d3c_4d57_a2b5_0a6f3d2f7c11.slice/cri-containerd-ID.scope",
                Some(ID),
            ),
            (
                "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod8b1a5f5e.slice/crio-ID.scope",
                Some(ID),
            ),
            (
                "/kubepods.slice/kubepods-pod8b1a5f5e.slice/docker-ID.scope",
                Some(ID),
            ),
            (
                "/kubepods/burstable/pod8b1a5f5e-0d3c-4d57-a2b5-0a6f3d2f7c11/ID",
                Some(ID),
            ),
            (
                "/kubepods/pod8b1a5f5e-0d3c-4d57-a2b5-0a6f3d2f7c11/crio-ID",
                Some(ID),
            ),
            (
                "/system.slice/containerd.service/kubepods-besteffort-pod8b1a5f5e.slice:cri-containerd:ID",
                Some(ID),
            ),
            // Kubernetes in docker: the innermost
            (
                "/docker/OUTER/kubelet.slice/kubelet-kubepods.slice/cri-containerd-ID.scope",
                Some(ID),
            ),
            ("/docker/OUTER/system.slice/kubelet.service", Some(OUTER)),
            // podman: root, rootless, inside its own scope, cgroupfs, split
            ("/machine.slice/libpod-ID.scope", Some(ID)),
            ("/machine.slice/libpod-ID.scope/container", Some(ID)),
            (
                "/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-ID.scope/container",
                Some(ID),
            ),
            ("/libpod_parent/libpod-ID", Some(ID)),
            ("/system.slice/web.service/libpod-payload-ID", Some(ID)),
            // LXC and LXD
            ("/lxc/web", Some("web")),
            ("/lxc/web/system.slice/nginx.service", Some("web")),
            ("/lxc.payload.web-1/init.scope", Some("web-1")),
            ("/lxc.payload/web", Some("web")),
            ("/lxc.payload.web/docker/ID", Some(ID)),
            // systemd-nspawn
            ("/machine.slice/machine-web.scope/payload", Some("web")),
            (r"/machine.slice/machine-my\x2dweb.scope", Some("my-web")),
            (
                r"/machine.slice/systemd-nspawn@my\x2dweb.service/payload",
                Some("my-web"),
            ),
            // Monitors and virtual machines run on the host
            ("/machine.slice/libpod-conmon-ID.scope", None),
            ("/kubepods.slice/crio-conmon-ID.scope", None),
            ("/lxc.monitor.web", None),
            ("/lxc.monitor/web", None),
            (r"/machine.slice/machine-qemu\x2d1\x2dvm.scope", None),
            // No containers
            ("/", None),
            ("", None),
            ("/system.slice/docker.service", None),
            ("/system.slice/ssh.service", None),
            ("/user.slice/user-1000.slice/session-3.scope", None),
            ("/kubepods.slice/kubepods-burstable.slice", None),
            ("/docker/not-an-id", None),
            ("/lxc", None),
            ("/lxc/", None),
            ("/machine.slice/machine-.scope", None),
            ("/system.slice/ID.service", None),
        ] {
            let path = path.replace("OUTER", OUTER).replace("ID", ID);
            assert_eq!(of_cgroup(&path).as_deref(), expected, "{path}");
        }
    }

    #[test]
    fn a_path_may_have_any_number_of_parts() {
        let deep = format!("/docker/{ID}{}", "/a".repeat(1 << 20));
        assert_eq!(of_cgroup(&deep).as_deref(), Some(ID));
    }

    #[test]
    fn an_id_has_64_lower_case_hex_digits() {
        for wrong in [
            &ID[1..],
            &format!("{ID}0"),
            &ID.to_uppercase(),
            &ID.replace('4', "g"),
        ] {
            assert_eq!(of_cgroup(&format!("/docker/{wrong}")), None);
        }
    }
}
