use super::*;

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
