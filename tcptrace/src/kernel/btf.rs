//! Reading BTF, the kernel's description of its own types: where a member lies, how many arguments a
//! function takes.
//!
//! Format: `Documentation/bpf/btf.rst` (6.18). The bytes are the kernel's, but nothing here trusts
//! them: every reading is bounds-checked, and every walk is bounded.

use std::{fmt, io, path::Path};

/// Where the running kernel shows its BTF.
pub const KERNEL_BTF: &str = "/sys/kernel/btf/vmlinux";

const MAGIC: u16 = 0xeb9f;
const HEADER_LEN: usize = 24;
/// How deep anonymous structs and typedefs may nest; the kernel's own limit for resolving is 32.
const DEPTH: u32 = 32;
/// How many members are read to find one. The largest structs of 6.18 have a few hundred. Depth alone is no limit:
/// where each struct has two anonymous ones inside, every level doubles the work.
const MOST_MEMBERS: u32 = 1 << 16;

/// The kinds that are looked at (`include/uapi/linux/btf.h`).
mod kind {
    pub(super) const INT: u32 = 1;
    pub(super) const PTR: u32 = 2;
    pub(super) const ARRAY: u32 = 3;
    pub(super) const STRUCT: u32 = 4;
    pub(super) const UNION: u32 = 5;
    pub(super) const ENUM: u32 = 6;
    pub(super) const FWD: u32 = 7;
    pub(super) const TYPEDEF: u32 = 8;
    pub(super) const VOLATILE: u32 = 9;
    pub(super) const CONST: u32 = 10;
    pub(super) const RESTRICT: u32 = 11;
    pub(super) const FUNC: u32 = 12;
    pub(super) const FUNC_PROTO: u32 = 13;
    pub(super) const VAR: u32 = 14;
    pub(super) const DATASEC: u32 = 15;
    pub(super) const FLOAT: u32 = 16;
    pub(super) const DECL_TAG: u32 = 17;
    pub(super) const TYPE_TAG: u32 = 18;
    pub(super) const ENUM64: u32 = 19;
}

/// Type information that could be read through once.
pub struct Btf {
    data: Vec<u8>,
    strings: usize,
    /// Where each type begins in `data`; type 0 is `void` and has no place.
    types: Vec<usize>,
    /// Structs and unions that have a name. There are thousands, and a few dozen are looked for: it takes longer to
    /// make a table of their names than to look through them.
    structs: Vec<u32>,
    functions: Vec<u32>,
}

/// Why something is not known of the kernel's types.
#[derive(Debug, PartialEq, Eq)]
pub enum Error {
    /// The bytes are not BTF, or break off; what was being read.
    Malformed(&'static str),
    /// No struct of this name.
    NoStruct(String),
    /// The struct is there and has no such member.
    NoMember {
        /// The whole path looked for.
        path: String,
        /// The part that is not there.
        member: String,
    },
    /// The member does not begin at a byte.
    BitField(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Malformed(what) => write!(f, "malformed BTF ({what})"),
            Self::NoStruct(name) => write!(f, "this kernel has no struct {name}"),
            Self::NoMember { path, member } => {
                write!(f, "this kernel has no {path} (no member {member})")
            }
            Self::BitField(path) => write!(f, "{path} is a bit field on this kernel"),
        }
    }
}

impl std::error::Error for Error {}

/// One type's fixed part.
#[derive(Clone, Copy)]
struct Type {
    at: usize,
    name: u32,
    kind: u32,
    /// Number of members, parameters, or values.
    len: usize,
    /// Members carry a bit-field size in the top byte of their offset.
    bit_fields: bool,
    /// Size, or the type referred to.
    refers: u32,
}

impl Btf {
    /// Reads the running kernel's BTF.
    ///
    /// # Errors
    /// When the file cannot be read ([`io::ErrorKind::NotFound`]: the kernel was built without it), or
    /// is not BTF ([`io::ErrorKind::InvalidData`]).
    pub fn of_kernel() -> io::Result<Self> {
        let data = std::fs::read(Path::new(KERNEL_BTF))?;
        Self::parse(data).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
    }

    /// Takes the bytes of a BTF section apart.
    ///
    /// # Errors
    /// [`Error::Malformed`] when they are not BTF in this machine's byte order, or break off.
    pub fn parse(data: Vec<u8>) -> Result<Self, Error> {
        let malformed = Error::Malformed;
        if u16_at(&data, 0) != Some(MAGIC) {
            return Err(malformed("no magic number"));
        }
        let field = |at| {
            u32_at(&data, at)
                .map(|value| value as usize)
                .ok_or(malformed("header"))
        };
        let header_len = field(4)?;
        if header_len < HEADER_LEN {
            return Err(malformed("header length"));
        }
        let section = |offset: usize, len: usize| {
            let start = header_len.checked_add(offset)?;
            let end = start.checked_add(len)?;
            (end <= data.len()).then_some((start, end))
        };
        let (types_start, types_end) =
            section(field(8)?, field(12)?).ok_or(malformed("type section"))?;
        let (strings, strings_end) =
            section(field(16)?, field(20)?).ok_or(malformed("string section"))?;

        let mut btf = Self {
            strings,
            types: vec![usize::MAX],
            structs: Vec::new(),
            functions: Vec::new(),
            data,
        };
        btf.data.truncate(types_end.max(strings_end));
        let mut at = types_start;
        while at < types_end {
            let id = btf.types.len() as u32;
            let ty = btf.type_at(at).ok_or(malformed("type"))?;
            let end = at + 12 + ty.tail().ok_or(malformed("kind of type"))?;
            if end > types_end {
                return Err(malformed("end of types"));
            }
            let name = btf.strings_at(ty.name).ok_or(malformed("name"))?;
            if name.first().is_some_and(|byte| *byte != 0) {
                match ty.kind {
                    kind::STRUCT | kind::UNION => btf.structs.push(id),
                    kind::FUNC => btf.functions.push(id),
                    _ => {}
                }
            }
            btf.types.push(at);
            at = end;
        }
        Ok(btf)
    }

    /// The offset in bytes of a member: `sock.__sk_common.skc_family`, or `sock.sk_err`. A dot goes
    /// into a struct that lies inside; members of anonymous structs and unions are found as C finds
    /// them.
    ///
    /// # Errors
    /// When struct or member are not there, or it is a bit field.
    pub fn offset(&self, path: &str) -> Result<u32, Error> {
        let mut parts = path.split('.');
        let name = parts.next().unwrap_or_default();
        let mut id = self
            .named(&self.structs, name)
            .ok_or_else(|| Error::NoStruct(name.to_owned()))?;
        let mut bits: u32 = 0;
        for member in parts {
            let mut left = MOST_MEMBERS;
            let found = self.member(id, member.as_bytes(), DEPTH, &mut left);
            let (offset, ty) = found.ok_or_else(|| match left {
                0 => Error::Malformed("nesting of members"),
                _ => Error::NoMember {
                    path: path.to_owned(),
                    member: member.to_owned(),
                },
            })?;
            bits = bits.wrapping_add(offset);
            id = ty;
        }
        if bits.is_multiple_of(8) {
            Ok(bits / 8)
        } else {
            Err(Error::BitField(path.to_owned()))
        }
    }

    /// How many arguments a function takes; `None` when the kernel has none of this name.
    #[must_use]
    pub fn argument_count(&self, function: &str) -> Option<usize> {
        let function = self.ty(self.named(&self.functions, function)?)?;
        let prototype = self.ty(function.refers)?;
        (prototype.kind == kind::FUNC_PROTO).then_some(prototype.len)
    }

    /// The one of `ids` that has this name. It can occur twice; the first is the one that most of the kernel uses.
    fn named(&self, ids: &[u32], name: &str) -> Option<u32> {
        let is_it = |id: &&u32| {
            let strings = self.ty(**id).and_then(|ty| self.strings_at(ty.name));
            let rest = strings.and_then(|strings| strings.strip_prefix(name.as_bytes()));
            rest.and_then(<[u8]>::first) == Some(&0)
        };
        ids.iter().find(is_it).copied()
    }

    /// Offset in bits, and type, of a member, also inside anonymous ones. `left` is how many members it may still read.
    fn member(&self, id: u32, wanted: &[u8], depth: u32, left: &mut u32) -> Option<(u32, u32)> {
        let ty = self.strip(id)?;
        if depth == 0 || !matches!(ty.kind, kind::STRUCT | kind::UNION) {
            return None;
        }
        for i in 0..ty.len {
            *left = left.checked_sub(1)?;
            let at = ty.at + 12 + i * 12;
            let name = self.string(u32_at(&self.data, at)?)?;
            let of = u32_at(&self.data, at + 4)?;
            let raw = u32_at(&self.data, at + 8)?;
            let offset = if ty.bit_fields {
                raw & 0x00ff_ffff
            } else {
                raw
            };
            if name == wanted {
                return Some((offset, of));
            }
            if name.is_empty()
                && let Some((inner, of)) = self.member(of, wanted, depth - 1, left)
            {
                return Some((offset.wrapping_add(inner), of));
            }
        }
        None
    }

    /// The type behind typedefs and qualifiers.
    fn strip(&self, mut id: u32) -> Option<Type> {
        for _ in 0..DEPTH {
            let ty = self.ty(id)?;
            match ty.kind {
                kind::TYPEDEF | kind::CONST | kind::VOLATILE | kind::RESTRICT | kind::TYPE_TAG => {
                    id = ty.refers;
                }
                _ => return Some(ty),
            }
        }
        None
    }

    fn ty(&self, id: u32) -> Option<Type> {
        self.type_at(*self.types.get(id as usize)?)
    }

    fn type_at(&self, at: usize) -> Option<Type> {
        let info = u32_at(&self.data, at.checked_add(4)?)?;
        Some(Type {
            at,
            name: u32_at(&self.data, at)?,
            kind: info >> 24 & 0x1f,
            len: (info & 0xffff) as usize,
            bit_fields: info >> 31 == 1,
            refers: u32_at(&self.data, at + 8)?,
        })
    }

    fn string(&self, offset: u32) -> Option<&[u8]> {
        let rest = self.strings_at(offset)?;
        Some(&rest[..rest.iter().position(|byte| *byte == 0)?])
    }

    /// A string, and all that come after it.
    fn strings_at(&self, offset: u32) -> Option<&[u8]> {
        self.data.get(self.strings.checked_add(offset as usize)?..)
    }
}

impl Type {
    /// How many bytes follow the fixed part; `None` for a kind that is not known.
    fn tail(&self) -> Option<usize> {
        Some(match self.kind {
            kind::INT | kind::VAR | kind::DECL_TAG => 4,
            kind::ARRAY => 12,
            kind::STRUCT | kind::UNION | kind::DATASEC | kind::ENUM64 => self.len * 12,
            kind::ENUM | kind::FUNC_PROTO => self.len * 8,
            kind::PTR
            | kind::FWD
            | kind::TYPEDEF
            | kind::VOLATILE
            | kind::CONST
            | kind::RESTRICT
            | kind::FUNC
            | kind::FLOAT
            | kind::TYPE_TAG => 0,
            _ => return None,
        })
    }
}

fn u16_at(data: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*data.get(at..)?.first_chunk()?))
}

fn u32_at(data: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*data.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Puts a small BTF section together, the way `pahole` would.
    #[derive(Default)]
    struct Writer {
        types: Vec<u8>,
        strings: Vec<u8>,
    }

    impl Writer {
        fn name(&mut self, name: &str) -> u32 {
            if self.strings.is_empty() {
                self.strings.push(0);
            }
            if name.is_empty() {
                return 0;
            }
            let at = self.strings.len() as u32;
            self.strings.extend(name.bytes().chain([0]));
            at
        }

        fn words(&mut self, words: &[u32]) {
            for word in words {
                self.types.extend(word.to_ne_bytes());
            }
        }

        fn ty(&mut self, name: &str, kind: u32, len: u32, flag: bool, refers: u32) {
            let name = self.name(name);
            self.words(&[name, kind << 24 | len | u32::from(flag) << 31, refers]);
        }

        fn member(&mut self, name: &str, of: u32, bits: u32) {
            let name = self.name(name);
            self.words(&[name, of, bits]);
        }

        fn finish(self) -> Vec<u8> {
            let mut out = Vec::new();
            out.extend(MAGIC.to_ne_bytes());
            out.extend([1, 0]);
            for word in [
                24,
                0,
                self.types.len() as u32,
                self.types.len() as u32,
                self.strings.len() as u32,
            ] {
                out.extend(word.to_ne_bytes());
            }
            out.extend(self.types);
            out.extend(self.strings);
            out
        }
    }

    /// `struct inner { int a; union { int b; struct { int c; int d; }; }; };`
    /// `struct outer { int x; inner_t in; int bit : 1; };` and `int f(int, int)`.
    fn sample() -> Vec<u8> {
        let mut w = Writer::default();
        w.ty("int", kind::INT, 0, false, 4); // 1
        w.words(&[32]);
        w.ty("", kind::STRUCT, 2, false, 8); // 2
        w.member("c", 1, 0);
        w.member("d", 1, 32);
        w.ty("", kind::UNION, 2, false, 8); // 3
        w.member("b", 1, 0);
        w.member("", 2, 0);
        w.ty("inner", kind::STRUCT, 2, false, 12); // 4
        w.member("a", 1, 0);
        w.member("", 3, 32);
        w.ty("inner_t", kind::TYPEDEF, 0, false, 4); // 5
        w.ty("outer", kind::STRUCT, 3, true, 20); // 6
        w.member("x", 1, 0);
        w.member("in", 5, 32);
        w.member("bit", 1, 1 << 24 | 129);
        w.ty("", kind::FUNC_PROTO, 2, false, 1); // 7
        w.words(&[0, 1, 0, 1]);
        w.ty("f", kind::FUNC, 0, false, 7); // 8
        w.finish()
    }

    #[test]
    fn finds_members_as_c_does() {
        let btf = Btf::parse(sample()).unwrap();
        assert_eq!(btf.offset("outer.x"), Ok(0));
        assert_eq!(btf.offset("outer.in.a"), Ok(4));
        assert_eq!(btf.offset("outer.in.b"), Ok(8));
        assert_eq!(btf.offset("outer.in.d"), Ok(12));
    }

    #[test]
    fn names_what_is_not_there() {
        let btf = Btf::parse(sample()).unwrap();
        assert_eq!(
            btf.offset("nothing.x"),
            Err(Error::NoStruct("nothing".to_owned()))
        );
        let error = btf.offset("outer.in.z").unwrap_err();
        assert_eq!(
            error.to_string(),
            "this kernel has no outer.in.z (no member z)"
        );
        assert_eq!(
            btf.offset("outer.bit"),
            Err(Error::BitField("outer.bit".to_owned()))
        );
    }

    #[test]
    fn counts_arguments() {
        let btf = Btf::parse(sample()).unwrap();
        assert_eq!(btf.argument_count("f"), Some(2));
        assert_eq!(btf.argument_count("g"), None);
    }

    #[test]
    fn survives_any_damage() {
        let good = sample();
        // Cut off anywhere, and every byte replaced by a few others.
        for end in 0..good.len() {
            exercise(good[..end].to_vec());
        }
        for at in 0..good.len() {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut bad = good.clone();
                bad[at] = value;
                exercise(bad);
            }
        }
    }

    fn exercise(data: Vec<u8>) {
        if let Ok(btf) = Btf::parse(data) {
            // Only that it comes back matters.
            let _ = (
                btf.offset("outer.in.d"),
                btf.offset("inner.d"),
                btf.argument_count("f"),
            );
        }
    }

    #[test]
    fn a_struct_inside_itself_ends() {
        let mut w = Writer::default();
        w.ty("loop", kind::STRUCT, 1, false, 4);
        w.member("", 1, 0);
        let btf = Btf::parse(w.finish()).unwrap();
        assert!(btf.offset("loop.x").is_err());
    }

    /// Found by `cargo xtask fuzz btf`: looking for one member took longer than a minute.
    #[test]
    fn structs_that_double_the_work_at_each_level_end() {
        let mut w = Writer::default();
        w.ty("top", kind::STRUCT, 2, false, 8); // 1
        w.member("", 1, 0);
        w.member("", 1, 32);
        let btf = Btf::parse(w.finish()).unwrap();
        assert_eq!(
            btf.offset("top.absent"),
            Err(Error::Malformed("nesting of members"))
        );
    }
}
