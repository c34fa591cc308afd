//! What tcptrace says of this kernel, for the page that compares kernels: `cargo xtask vm` asks.

use tests::{Tcptrace, figure};

#[test]
#[ignore = "tells `cargo xtask vm` what works, and checks nothing"]
fn what_works_here() {
    let run = Tcptrace::run(&["doctor", "-o", "json"]);
    let checks = run.lines.0[0].value["checks"].as_array();
    for check in checks.expect("checks") {
        let text = |field: &str| check[field].as_str().expect("text").to_owned();
        figure(&format!("works {} {}", text("name"), text("status")));
    }
}
