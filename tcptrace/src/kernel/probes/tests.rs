use super::*;
use crate::kernel::{capabilities::Capabilities, system::Lockdown};

/// Numbers of errors that say nothing of the kernel, and a word of what helps.
const RAN_OUT: [(i32, &str); 4] = [
    (libc::EMFILE, "ulimit -n"),
    (libc::ENFILE, "fs.file-max"),
    (libc::ENOMEM, "memory"),
    (libc::EAGAIN, "ulimit -u"),
];

#[test]
fn what_ran_out_is_never_taken_for_something_else() {
    // Systems of which something else would be said.
    let old = System {
        release: "4.19.0".to_owned(),
        ..System::permissive()
    };
    let locked = System {
        lockdown: Lockdown::Confidentiality,
        ..System::permissive()
    };
    let plain = System {
        capabilities: Capabilities(0),
        ..System::permissive()
    };
    for (errno, word) in RAN_OUT {
        let cause = Cause {
            errno: Some(errno),
            words: String::new(),
        };
        let program = Refused::Program {
            name: "timer_start".to_owned(),
            cause: cause.clone(),
        };
        let all = [
            program.clone(),
            Refused::BtfUnreadable(cause.clone()),
            Refused::Map(cause.clone()),
            Refused::Tracefs(cause.clone()),
        ];
        let followed = Followed {
            by: Kind::None,
            refused: vec![
                (Kind::Functions, program.clone()),
                (Kind::Tracepoints, program),
            ],
        };
        for system in [&old, &locked, &plain, &System::permissive()] {
            let symbols = Symbols::Unreadable(cause.clone());
            let mut reasons = vec![
                explain::time_wait(&followed, system).unwrap(),
                explain::accept(&followed, system).unwrap(),
                explain::endings(Kind::Tracepoints, &symbols, system).unwrap(),
                explain::not_as_asked("TIME_WAIT", &followed, system),
            ];
            for refused in &all {
                reasons.push(explain::transitions(refused, system));
                reasons.push(explain::variant(refused, system));
            }
            for reason in reasons {
                let told = reason.to_string();
                // Of the ring buffer's memory, it is its size.
                let ring_buffer = errno == libc::ENOMEM && told.contains("--buffer");
                assert!(told.contains(word) || ring_buffer, "{errno}: {told}");
                for wrong in [
                    "too old",
                    "report it",
                    "CONFIG_",
                    "locked down",
                    "run as root",
                    "capabilit",
                ] {
                    assert!(!told.contains(wrong), "{errno}: {told}");
                }
            }
        }
    }
}

#[test]
fn without_sysfs_it_is_not_the_kernel_that_lacks_something() {
    let told = explain::transitions(&Refused::NoSysfs, &System::permissive()).to_string();
    assert_eq!(
        told,
        "cannot read /sys/kernel/btf/vmlinux: sysfs is not mounted on /sys; mount it: mount -t sysfs sysfs /sys"
    );
}

fn refused(name: &str) -> Refused {
    Refused::Program {
        name: name.to_owned(),
        cause: Cause {
            errno: Some(libc::EPERM),
            words: String::new(),
        },
    }
}

#[test]
fn misses_are_read_from_fdinfo() {
    let fdinfo = "pos:\t0\nprog_type:\t26\nrun_cnt:\t0\nrecursion_misses:\t7\n";
    assert_eq!(recursion_misses(fdinfo), Some(7));
    assert_eq!(recursion_misses("pos:\t0\n"), None);
}

#[test]
fn functions_are_taken_before_tracepoints() {
    let all = |refused_kinds: &[Kind]| {
        follow(None, |kind| {
            if refused_kinds.contains(&kind) {
                Err(refused("f"))
            } else {
                Ok(())
            }
        })
    };
    assert_eq!(all(&[]).by, Kind::Functions);
    let second = all(&[Kind::Functions]);
    assert_eq!(second.by, Kind::Tracepoints);
    assert_eq!(second.refused, [(Kind::Functions, refused("f"))]);
    let none = all(&[Kind::Functions, Kind::Tracepoints]);
    assert_eq!((none.by, none.refused.len()), (Kind::None, 2));
}

#[test]
fn nothing_but_what_is_asked_for_is_tried() {
    for only in [Kind::Functions, Kind::Tracepoints, Kind::None] {
        let mut tried = Vec::new();
        let followed = follow(Some(only), |kind| {
            tried.push(kind);
            Ok(())
        });
        assert_eq!(followed.by, only);
        assert_eq!(tried, Vec::from_iter((only != Kind::None).then_some(only)));
    }
}

#[test]
fn the_buffer_suits_cpus_and_memory() {
    const GIB: u64 = 1 << 30;
    let mebibytes = |cpus, memory| default_buffer(cpus, memory, false) >> 20;
    assert_eq!(mebibytes(1, 24 * GIB), 8);
    assert_eq!(mebibytes(2, 24 * GIB), 8);
    assert_eq!(mebibytes(6, 24 * GIB), 16, "a power of two");
    assert_eq!(mebibytes(192, 1024 * GIB), 64);
    assert_eq!(mebibytes(192, 2 * GIB), 16);
    assert_eq!(mebibytes(2, GIB / 2), 4);
    assert_eq!(default_buffer(2, 0, false), 1 << 16);
    assert_eq!(default_buffer(2, 24 * GIB, true), 64 << 20);
    assert_eq!(default_buffer(192, 1024 * GIB, true), 512 << 20);
}
