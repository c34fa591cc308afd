//! The mount table of a process: `/proc/PID/mountinfo`, see proc_pid_mountinfo(5).

use std::borrow::Cow;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount<'a> {
    /// What of the file system is mounted: a path in it, or for nsfs a name such as `net:[4026532177]`.
    pub root: Cow<'a, [u8]>,
    /// Where, as the process sees it.
    pub point: PathBuf,
    /// Kind of file system: `cgroup2`, `nsfs`, `proc`.
    pub kind: &'a [u8],
    /// Options of the file system, separated by commas.
    pub options: &'a [u8],
}

/// The mounts in a mountinfo file, in its order. Lines that make no sense are left out.
pub fn mounts(mountinfo: &[u8]) -> impl Iterator<Item = Mount<'_>> {
    mountinfo.split(|&byte| byte == b'\n').filter_map(mount)
}

/// `36 35 98:0 /root /point rw,noatime master:1 - ext3 /dev/root rw,errors=continue`: any number of
/// fields stands before the dash.
fn mount(line: &[u8]) -> Option<Mount<'_>> {
    let mut fields = line.split(|&byte| byte == b' ');
    let root = fields.nth(3)?;
    let point = fields.next()?;
    let mut rest = fields.skip_while(|&field| field != b"-").skip(1);
    let kind = rest.next()?;
    let options = rest.nth(1)?;
    Some(Mount {
        root: unescape(root),
        point: PathBuf::from(OsString::from_vec(unescape(point).into_owned())),
        kind,
        options,
    })
}

/// Blank, tab, newline and backslash stand as a backslash and three octal digits.
fn unescape(field: &[u8]) -> Cow<'_, [u8]> {
    if !field.contains(&b'\\') {
        return Cow::Borrowed(field);
    }
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, after)) = rest.split_first() {
        match after {
            [
                a @ b'0'..=b'3',
                b @ b'0'..=b'7',
                c @ b'0'..=b'7',
                after @ ..,
            ] if byte == b'\\' => {
                plain.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = after;
            }
            _ => {
                plain.push(byte);
                rest = after;
            }
        }
    }
    Cow::Owned(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_fields_around_the_dash() {
        let text =
            b"22 27 0:21 / /proc rw,relatime shared:5 master:1 - proc proc rw,hidepid=invisible\n\
            43 42 0:4 net:[4026532177] /run/netns/blue rw shared:2 - nsfs nsfs rw\n\
            38 31 0:31 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";
        let mounts: Vec<_> = mounts(text).collect();
        assert_eq!(mounts.len(), 3);
        assert_eq!(mounts[0].kind, b"proc");
        assert_eq!(mounts[0].options, b"rw,hidepid=invisible");
        assert_eq!(&*mounts[1].root, b"net:[4026532177]");
        assert_eq!(mounts[1].point, PathBuf::from("/run/netns/blue"));
        assert_eq!(mounts[2].kind, b"cgroup2");
    }

    #[test]
    fn a_blank_in_a_path_is_no_separator() {
        let text = br"43 42 0:4 / /mnt/a\040b\134c\011\0 rw - ext4 /dev/x\040y rw";
        let mounts: Vec<_> = mounts(text).collect();
        assert_eq!(mounts[0].point, PathBuf::from("/mnt/a b\\c\t\\0"));
    }

    #[test]
    fn lines_that_make_no_sense_are_left_out() {
        let text = b"\n43\n43 42 0:4 / /x rw\n43 42 0:4 / /x rw -\n43 42 0:4 / /x rw - ext4 dev\n";
        assert_eq!(mounts(text).count(), 0);
    }
}
