//! A process that says which signals it gets: a line for each, with its name and the pid of whoever sent
//! it, or `kernel`. It ends with code 3 on SIGUSR2.

use std::process::exit;

use nix::sys::{
    signal::{SigSet, Signal},
    signalfd::SignalFd,
};

#[expect(clippy::print_stdout, reason = "for the test that reads it")]
fn main() {
    let all = SigSet::all();
    all.thread_block().expect("signals can be blocked");
    let signals = SignalFd::new(&all).expect("signals can be read");
    println!("ready");
    while let Ok(Some(info)) = signals.read_signal() {
        let signal = Signal::try_from(info.ssi_signo.cast_signed()).expect("a signal's number");
        if info.ssi_code == libc::SI_KERNEL {
            println!("{signal} kernel");
        } else {
            println!("{signal} {}", info.ssi_pid);
        }
        if signal == Signal::SIGUSR2 {
            exit(3);
        }
    }
}
