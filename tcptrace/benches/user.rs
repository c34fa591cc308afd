//! What a record, and a line, cost in user space. `cargo bench -p tcptrace`; `cargo xtask bench` counts the
//! instructions of the same work, which a noisy machine does not change.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use tcptrace::{
    select::Selection,
    stream,
    tracker::{Fact, Tracker},
    view::View,
};

mod traffic;

use traffic::Records;

/// Enough for a minute of TIME_WAIT, and as long again.
const CONNECTIONS: u64 = 20_000;

fn records(criterion: &mut Criterion) {
    let records = Records::of(CONNECTIONS);
    let all = records.len();
    let mut group = criterion.benchmark_group("records");
    group.throughput(Throughput::Elements(all as u64));
    group.bench_function("decode", |bencher| {
        bencher.iter(|| traffic::decode(&records, all));
    });
    group.bench_function("decode and tracker", |bencher| {
        bencher.iter(|| {
            traffic::track(&records, all, &mut |fact| {
                black_box(&fact);
            })
        });
    });
    group.finish();
}

fn lines(criterion: &mut Criterion) {
    let changes = traffic::changes(&Records::of(CONNECTIONS));
    let tracker = Tracker::new(Selection::default());
    let mut group = criterion.benchmark_group("lines");
    group.throughput(Throughput::Elements(changes.len() as u64));
    let mut view = |name: &str, view: &mut dyn FnMut()| {
        group.bench_function(name, |bencher| bencher.iter(&mut *view));
    };
    let mut json = stream::Json::new(traffic::nowhere());
    json.clock(0, traffic::BOOT_TO_UTC_NS);
    view("json", &mut || {
        for change in &changes {
            json.fact(Fact::Change(*change));
        }
        json.flush(&tracker, 0).expect("/dev/null takes it");
    });
    let mut text = stream::Text::new(traffic::nowhere());
    text.clock(0, traffic::BOOT_TO_UTC_NS);
    view("text", &mut || {
        for change in &changes {
            text.fact(Fact::Change(*change));
        }
        text.flush(&tracker, 0).expect("/dev/null takes it");
    });
    group.finish();
}

criterion_group!(benches, records, lines);
criterion_main!(benches);
