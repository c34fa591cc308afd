//! Addresses of kernel functions, from `/proc/kallsyms`.

use std::{
    fs::File,
    io::{self, BufRead, BufReader},
};

use tcptrace_ebpf::TextRange;

/// Finds where functions lie. A function ends where the next symbol begins; one that is not there is an
/// empty range. `None` where the kernel hides all addresses (zeros without `CAP_SYSLOG`).
///
/// # Errors
/// When `/proc/kallsyms` cannot be read.
pub fn find<const N: usize>(names: [&str; N]) -> io::Result<Option<[TextRange; N]>> {
    read(BufReader::new(File::open("/proc/kallsyms")?), names)
}

fn read<const N: usize>(
    mut lines: impl BufRead,
    names: [&str; N],
) -> io::Result<Option<[TextRange; N]>> {
    let mut starts = [0; N];
    let mut line = Vec::new();
    let mut all = Vec::new();
    while lines.read_until(b'\n', &mut line)? > 0 {
        if let Some((address, name)) = symbol(&line) {
            all.push(address);
            if let Some(index) = names.iter().position(|wanted| wanted.as_bytes() == name) {
                starts[index] = address;
            }
        }
        line.clear();
    }
    if all.iter().all(|address| *address == 0) {
        return Ok(None);
    }
    all.sort_unstable();
    Ok(Some(starts.map(|start| {
        let end = all
            .get(all.partition_point(|address| *address <= start))
            .copied();
        match end {
            Some(end) if start != 0 => TextRange { start, end },
            _ => TextRange::default(),
        }
    })))
}

/// Address and name of a symbol in the kernel's text: `ffffffff81000000 t name`, with ` [module]` after
/// it for a module's.
fn symbol(line: &[u8]) -> Option<(u64, &[u8])> {
    let mut fields = line
        .split(u8::is_ascii_whitespace)
        .filter(|field| !field.is_empty());
    let address = std::str::from_utf8(fields.next()?).ok()?;
    let address = u64::from_str_radix(address, 16).ok()?;
    let [b't' | b'T'] = fields.next()? else {
        return None;
    };
    Some((address, fields.next()?))
}

/// See [`crate::fuzz`].
pub(crate) fn fuzz(bytes: &[u8]) {
    let names = ["inet_twsk_kill", "tw_timer_handler", "inet_twsk_alloc"];
    let found = read(bytes, names).expect("memory can be read");
    for range in found.iter().flatten() {
        assert!(range.start == 0 || range.start < range.end, "{range:?}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &[u8] = b"ffffffff82008740 t inet_twsk_kill\n\
        ffffffff820089f0 t tw_timer_handler\n\
        ffffffff82100000 D tw_timer_handler\n\
        ffffffff82008ad0 T inet_twsk_alloc\n\
        ffffffffc0000000 t last\t[module]\n";

    #[test]
    fn a_function_ends_where_the_next_begins() {
        let [handler, last] = read(TEXT, ["tw_timer_handler", "last"]).unwrap().unwrap();
        assert_eq!(
            handler,
            TextRange {
                start: 0xffff_ffff_8200_89f0,
                end: 0xffff_ffff_8200_8ad0
            }
        );
        assert_eq!(last, TextRange::default());
    }

    #[test]
    fn a_function_that_is_not_there_is_no_range() {
        let found = read(TEXT, ["inet_twsk_free"]).unwrap();
        assert_eq!(found, Some([TextRange::default()]));
    }

    #[test]
    fn hidden_addresses_are_unknown() {
        let hidden = b"0000000000000000 t tw_timer_handler\n0000000000000000 T next\n";
        assert_eq!(read(&hidden[..], ["tw_timer_handler"]).unwrap(), None);
    }
}
