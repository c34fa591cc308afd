//! Truth, measured: several hundred connections of every kind at once, played by a script that knows what
//! must be reported of each: every change of state with its time and owner, every TIME_WAIT with its dwell
//! and its ending, everything that is left open with its cause and its holders.
//!
//! The script is random. `TCPTRACE_SEED` replays one, by a number that every run prints; `TCPTRACE_STORIES`
//! says how many stories are played, 250 if it does not. It lasts as long as TIME_WAIT and half a minute.

mod kinds;
mod random;
mod stage;
mod story;
mod verdict;
mod witness;

use std::{
    collections::BTreeSet,
    env, fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    process,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use kinds::{BEFORE, KINDS, Kind};
use random::Random;
use serde_json::Value;
use stage::{Gate, Place, Stage, Window};
use story::{End, Story};
use tests::{Lab, Line, Lines, Observer, Report, Tcptrace, boottime, figure, wheel_step};
use verdict::{Findings, Shown, Tally, judge};
use witness::Witness;

/// Stories begin within this time.
const BEGINNINGS: Duration = Duration::from_secs(8);
/// What is left open for longer is a leak.
const OLDER_THAN: Duration = Duration::from_secs(2);
/// How often it is looked for that.
const INTERVAL: Duration = Duration::from_secs(1);
/// How long to wait for looks at most. Orphans last a minute.
const LOOKS: Duration = Duration::from_secs(25);
/// How often records may be lost, which happens on a busy machine.
const ATTEMPTS: usize = 3;
/// How many of those that are wrong are told.
const TOLD: usize = 30;
/// Nothing that a story does takes longer.
const PLAY: Duration = Duration::from_secs(120);

/// The same script in every run.
#[test]
fn fixed_seed() {
    truth(1);
}

/// Another one in every run.
#[test]
fn fresh_seed() {
    let since = || SystemTime::now().duration_since(UNIX_EPOCH);
    let fresh = || since().expect("after 1970").as_millis() as u64 % 1_000_000;
    truth(number("TCPTRACE_SEED").unwrap_or_else(fresh));
}

fn truth(seed: u64) {
    let stories = number("TCPTRACE_STORIES").unwrap_or(250);
    let again = format!(
        "TCPTRACE_SEED={seed} TCPTRACE_STORIES={stories} cargo test -p tests --test truth fresh plays it again"
    );
    // What was lost nobody can judge, and tcptrace says that it was.
    let tally = (0..ATTEMPTS).find_map(|_| {
        let Some(stage) = stage() else {
            return Some(Tally::default());
        };
        figure(&format!("truth: seed {seed}, {stories} stories; {again}"));
        let tally = perform(&stage, stories, seed);
        if tally.is_none() {
            figure("truth: records were lost, and tcptrace said so: once more");
        }
        tally
    });
    let tally = tally.unwrap_or_else(|| panic!("records were lost {ATTEMPTS} times; {again}"));
    if !tally.excused.is_empty() {
        figure(&format!(
            "truth: {} sockets not judged: this kernel changed them while it ran process 1, where it runs no \
             BPF program",
            tally.excused.len()
        ));
    }
    let wrong = &tally.wrong;
    let told = wrong[..wrong.len().min(TOLD)].join("\n");
    assert!(wrong.is_empty(), "{} wrong; {again}\n{told}", wrong.len());
}

/// Plays, traces and judges; nothing if records were lost.
fn perform(stage: &Stage, stories: u64, seed: u64) -> Option<Tally> {
    let mut random = Random::new(seed);
    let plan = plan(stories, &mut random);
    let mut troupe: Vec<_> = plan
        .into_iter()
        .enumerate()
        .map(|(number, kind)| (kind, Story::new(kind.0, number, stage, random.next())))
        .collect();
    for (kind, story) in &mut troupe {
        if kind.0 == BEFORE.0 {
            kinds::begin_before(story);
        }
    }

    let witness = Witness::start(seed);
    let mut recording = Recording::new(seed);
    let inodes = netns_options(stage);
    let record = recording.start(&inodes);
    let stream = Tcptrace::start(&arguments(&["stream"], &inodes));

    let mut played = play(stage, &recording, troupe, &mut random);
    watch_the_ends(stage, &mut played.outcomes);
    // Time to tell of an end that was kept back.
    thread::sleep(Duration::from_millis(500));
    let (live, record) = (stream.finish(), record.finish());
    let witness = witness.finish().unwrap_or_else(|error| {
        figure(&format!(
            "truth: nobody sees what is done while process 1 runs: {error}"
        ));
        witness::Seen::default()
    });
    for run in [&live, &record] {
        assert_eq!(run.code, Some(0), "{}", run.stderr);
    }
    let streamed = recording.show(&["stream"]);
    if [&live.lines, &streamed]
        .iter()
        .any(|lines| lines.end().value["lost"] != 0)
    {
        return None;
    }
    let timewait = recording.show(&["timewait"]);
    let older = format!("{}s", OLDER_THAN.as_secs());
    let leaks = recording.show(&["leaks", "--older-than", &older]);
    let report = report(&leaks, played.gate_opened);
    let listed: Vec<_> = report.leaks.iter().map(|leak| leak.0).collect();

    let mut tally = Tally::default();
    let gone = *stage::locked(&stage.gone);
    for (shown, told) in [
        (Shown::new(&streamed, &timewait, &listed), "recorded"),
        (Shown::of_stream(&live.lines), "live"),
    ] {
        judge_all(&played.outcomes, &shown, told, &witness, gone, &mut tally);
    }
    let steady = played.steady..played.gate_opened;
    let all = (report.number("sockets"), report.number("half_closed"));
    for other in leaks.reports() {
        let changed = (other.number("sockets"), other.number("half_closed")) != all;
        let within = steady.contains(&boottime_of(other.end));
        tally.check("steady", !(within && changed), || {
            format!(
                "nothing had changed, and yet: {}\n    then: {}",
                other.end, report.end
            )
        });
    }
    let (truth, told) = (played.answering(), report.number("half_closed"));
    tally.check("half closed", told == truth, || {
        format!("{truth} are half closed: {}", report.end)
    });
    for failure in played.failures {
        tally.check("played", false, || failure);
    }
    figure(&format!("truth: right/all: {}", tally.aspects()));
    figure(&format!(
        "truth: dwell of TIME_WAIT wrong by at most: {}",
        tally.dwells()
    ));
    let step = wheel_step(60) as f64 / 1e9;
    if !tally.is_sharp(step) {
        tally.wrong.push(format!(
            "  of too few sockets it was seen to a step of the timer wheel, {step} s, how long they were in TIME_WAIT"
        ));
    }
    recording.keep = !tally.wrong.is_empty();
    Some(tally)
}

fn number(name: &str) -> Option<u64> {
    let text = env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name}={text} is no number")),
    )
}

/// Namespaces with processes, as yet without a trace.
fn stage() -> Option<Stage> {
    let lab = || Lab::new();
    let places = [lab()?, lab()?].into_iter().enumerate();
    let places: Vec<_> = places
        .map(|(number, lab)| Arc::new(Place::new(lab, number)))
        .collect();
    for place in &places {
        place.lab.netns.set("ipv4/tcp_syn_retries", "1");
    }
    let full = Place::new(lab()?, 2);
    full.lab.netns.set("ipv4/tcp_max_tw_buckets", "0");
    Some(Stage {
        places,
        full: Arc::new(full),
        elsewhere: Arc::new(Place::new(lab()?, 3)),
        doomed: Mutex::new(Some(Place::bare(lab()?, 4))),
        gone: Mutex::new(None),
        gate: Gate::default(),
    })
}

/// `--netns` for each that is asked for.
fn netns_options(stage: &Stage) -> Vec<String> {
    let doomed = stage::locked(&stage.doomed);
    let doomed = doomed.as_ref().map(|place| place.netns);
    let places = stage
        .places
        .iter()
        .chain([&stage.full])
        .map(|place| place.netns);
    let options = places.chain(doomed);
    options
        .flat_map(|netns| ["--netns".to_owned(), netns.to_string()])
        .collect()
}

fn arguments<'a>(first: &[&'a str], more: &'a [String]) -> Vec<&'a str> {
    first
        .iter()
        .copied()
        .chain(more.iter().map(String::as_str))
        .collect()
}

/// Every kind once, then by weight, in any order.
fn plan(stories: u64, random: &mut Random) -> Vec<Kind> {
    let kinds: Vec<Kind> = KINDS.into_iter().chain([BEFORE]).collect();
    let all: u64 = kinds.iter().map(|kind| kind.1).sum();
    let mut plan = kinds.clone();
    while (plan.len() as u64) < stories {
        let mut at = random.below(all);
        let kind = kinds.iter().find(|kind| {
            let here = at < kind.1;
            at = at.saturating_sub(kind.1);
            here
        });
        plan.push(*kind.expect("within all weights"));
    }
    for at in (1..plan.len()).rev() {
        plan.swap(at, random.below(at as u64 + 1) as usize);
    }
    plan
}

/// What came of playing.
struct Played {
    /// What is true, by story; more than one possibility where the kernel has the choice.
    outcomes: Vec<(String, Vec<Vec<End>>)>,
    /// Stories that could not be played.
    failures: Vec<String>,
    /// From when to when what was left open stayed the same, boot time.
    steady: i64,
    gate_opened: i64,
}

impl Played {
    /// How many are half closed, and answered, when that is looked at.
    fn answering(&self) -> u64 {
        let ends = self
            .outcomes
            .iter()
            .filter_map(|(_, outcomes)| outcomes.first())
            .flatten();
        let answers = |end: &&End| end.leak.as_ref().is_some_and(|left| left.cause.is_none());
        ends.filter(answers).count() as u64
    }
}

fn play(
    stage: &Stage,
    recording: &Recording,
    troupe: Vec<(Kind, Story<'_>)>,
    random: &mut Random,
) -> Played {
    let all = troupe.len();
    let mut played = Played {
        outcomes: Vec::new(),
        failures: Vec::new(),
        steady: i64::MAX,
        gate_opened: 0,
    };
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let mut threads = Vec::new();
        for (kind, mut story) in troupe {
            let begin = random.milliseconds(0, BEGINNINGS.as_millis() as u64);
            threads.push(scope.spawn(move || {
                thread::sleep(begin);
                let title = format!("story {}, {}", story.number, story.kind);
                let result = catch_unwind(AssertUnwindSafe(|| kind.2(&mut story)));
                story.arrive();
                let mut outcomes = std::mem::take(&mut story.otherwise);
                outcomes.push(std::mem::take(&mut story.ends));
                let failure = result.err().map(|panic| {
                    let text = panic.downcast_ref::<String>().cloned();
                    let text = text
                        .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
                    format!(
                        "  {title}, could not be played: {}",
                        text.unwrap_or_default()
                    )
                });
                (title, outcomes, failure)
            }));
        }
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                stage.read_segments();
                thread::sleep(Duration::from_millis(20));
            }
        });
        if stage.gate.wait_arrived(all, PLAY) == all {
            let old = boottime() + OLDER_THAN.as_nanos() as i64;
            recording.await_looks(old);
            played.steady = boottime();
            thread::sleep(2 * INTERVAL);
        } else {
            played
                .failures
                .push(format!("not all had arrived within {PLAY:?}"));
        }
        played.gate_opened = boottime();
        stage.gate.open();
        for thread in threads {
            let (title, outcomes, failure) = thread.join().expect("panics are caught");
            match failure {
                Some(failure) => played.failures.push(failure),
                None => played.outcomes.push((title, outcomes)),
            }
        }
        over.store(true, Ordering::Relaxed);
    });
    played
}

/// Waits for the end of every TIME_WAIT that runs out, and has somebody else see it.
fn watch_the_ends(stage: &Stage, outcomes: &mut [(String, Vec<Vec<End>>)]) {
    let running = |end: &&mut End| {
        end.rest.as_ref().is_some_and(|rest| rest.ended.is_none()) && !end.elsewhere
    };
    fn ends(outcomes: &mut [(String, Vec<Vec<End>>)]) -> impl Iterator<Item = &mut End> {
        outcomes
            .iter_mut()
            .flat_map(|(_, outcomes)| outcomes)
            .flatten()
    }
    let first = ends(outcomes)
        .filter(running)
        .map(|end| entered(end).from)
        .min();
    let Some(first) = first else { return };
    let due = first + 58_000_000_000;
    stage.rest(true);
    while boottime() < due {
        thread::sleep(Duration::from_millis(100));
    }
    stage.rest(false);
    let observers: Vec<(u64, Observer)> = stage
        .places
        .iter()
        .map(|place| (place.netns, place.lab.observe()))
        .collect();
    // Until nothing rests any more, or somebody has gone wrong.
    let limit = boottime() + 90_000_000_000;
    let rests = |place: &Arc<Place>| {
        let rows = place.diag.as_ref().expect("it may be looked at").rows();
        rows.iter().any(|row| row.timewait)
    };
    while boottime() < limit && stage.places.iter().any(rests) {
        thread::sleep(Duration::from_millis(200));
    }
    thread::sleep(Duration::from_millis(100));
    for end in ends(outcomes).filter(running) {
        let observer = observers.iter().find(|(netns, _)| *netns == end.netns);
        let sighting =
            observer.and_then(|(_, observer)| observer.state(end.cookie.as_deref()?, "TIME_WAIT"));
        let (begun, rest) = (entered(end), end.rest.as_mut().expect("it rests"));
        let seen = sighting.filter(|sighting| sighting.gone != 0);
        // Never before its minute is over.
        rest.ended = seen.map(|seen| Window {
            from: seen.last.max(begun.from + 60_000_000_000),
            to: seen.gone,
        });
    }
}

/// When an end's TIME_WAIT began.
fn entered(end: &End) -> Window {
    end.steps.last().expect("the step to TIME_WAIT").window
}

/// A line of the namespace that went, later: somebody else has got its number.
fn is_later(line: &Line, gone: Option<(u64, i64)>) -> bool {
    gone.is_some_and(|(netns, time)| {
        line.value["netns"] == netns && line.time("time") > tests::realtime_of_boottime(time)
    })
}

fn judge_all(
    outcomes: &[(String, Vec<Vec<End>>)],
    shown: &Shown<'_>,
    told: &str,
    witness: &witness::Seen,
    gone: Option<(u64, i64)>,
    tally: &mut Tally,
) {
    let mut known = BTreeSet::new();
    for (title, outcomes) in outcomes {
        let judged = outcomes.iter().map(|ends| {
            let findings: Vec<Findings> = ends.iter().map(|end| judge(end, shown)).collect();
            let wrong: usize = findings.iter().map(Findings::wrong).sum();
            (wrong, ends, findings)
        });
        let best = judged.min_by_key(|(wrong, ..)| *wrong);
        let (_, ends, findings) = best.expect("at least one outcome");
        for (end, findings) in ends.iter().zip(&findings) {
            known.extend(findings.cookie.clone());
            if findings.wrong() > 0 && witness.excuses(end) {
                tally.excused.extend(end.cookie.clone());
            } else {
                tally.add(&format!("{title}, {told}"), end, findings);
            }
        }
    }
    for (cookie, line) in shown.all().filter(|(_, line)| !is_later(line, gone)) {
        tally.check("known", known.contains(cookie), || {
            format!("nobody played this, {told}: {line}")
        });
    }
}

/// When a report was made, boot time.
fn boottime_of(end: &Line) -> i64 {
    end.time("time") - tests::realtime_of_boottime(0)
}

/// The last report before that time.
fn report(lines: &Lines, before: i64) -> Report<'_> {
    let mut reports = lines.reports().into_iter();
    let report = reports.rfind(|report| boottime_of(report.end) < before);
    report.expect("it was looked for leaks before")
}

/// A recording, gone if it is not kept.
struct Recording {
    path: PathBuf,
    keep: bool,
}

impl Recording {
    fn new(seed: u64) -> Self {
        Self {
            path: env::temp_dir().join(format!("tcptrace-tests-{}-truth-{seed}", process::id())),
            keep: false,
        }
    }

    fn path(&self) -> &str {
        self.path.to_str().expect("a plain path")
    }

    fn start(&self, inodes: &[String]) -> Tcptrace {
        let interval = format!("{}s", INTERVAL.as_secs());
        Tcptrace::start_plain(&arguments(
            &["record", self.path(), "--interval", &interval],
            inodes,
        ))
    }

    /// Waits for looks at everything that is left open. What no table lists must be seen missing twice, and
    /// looks come seldom on a busy machine.
    fn await_looks(&self, since: i64) {
        let limit = Instant::now() + LOOKS;
        let is_look = |line: &str| {
            let line: Value = serde_json::from_str(line).unwrap_or_default();
            line["event"] == "look"
                && line["scope"] != "orphans"
                && line["time"].as_i64() > Some(since)
        };
        loop {
            thread::sleep(Duration::from_millis(250));
            let text = fs::read_to_string(&self.path).expect("a recording");
            if text.lines().filter(|line| is_look(line)).count() > 3 || Instant::now() > limit {
                return;
            }
        }
    }

    /// What a view shows of it.
    fn show(&self, view: &[&str]) -> Lines {
        let run = Tcptrace::run(&[view, &["-o", "json", "--from", self.path()]].concat());
        assert_eq!(run.code, Some(0), "{}", run.stderr);
        run.lines
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        if self.keep {
            figure(&format!("truth: the recording is kept: {}", self.path()));
        } else {
            let _ = fs::remove_file(&self.path);
        }
    }
}
