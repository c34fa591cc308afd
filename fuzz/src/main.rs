//! libFuzzer around one entry point of [`tcptrace::fuzz`], which the variable `FUZZ_TARGET` names. All other
//! arguments are libFuzzer's own.
//!
//! One program has all entry points, because each further program would cost another link of tcptrace.

#![no_main]

use std::{env, process, sync::OnceLock};

use libfuzzer_sys::fuzz_target;
use tcptrace::fuzz::{TARGETS, Target};

static CHOSEN: OnceLock<Target> = OnceLock::new();

fuzz_target!(
    init: {
        let wanted = env::var("FUZZ_TARGET").unwrap_or_default();
        let Some((_, target)) = TARGETS.iter().find(|(name, _)| *name == wanted) else {
            let names: Vec<_> = TARGETS.iter().map(|(name, _)| *name).collect();
            eprintln!("FUZZ_TARGET is {wanted:?}; it must be one of: {}", names.join(", "));
            process::exit(2);
        };
        CHOSEN.get_or_init(|| *target);
    },
    |bytes: &[u8]| {
        if let Some(target) = CHOSEN.get() {
            target(bytes);
        }
    }
);
