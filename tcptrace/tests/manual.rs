//! Man pages (`docs/man`) and completions (`deploy/completions`): made of the options, committed, and still
//! the same. Where they differ, `cargo xtask docs` writes them anew.

use std::{
    collections::BTreeMap,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::Command,
};

use clap::CommandFactory as _;
use clap_complete::Shell;
use clap_mangen::{
    Man,
    roff::{Roff, bold, roman},
};
use tcptrace::cli::Cli;

/// What a command says that says nothing else.
const EXIT_STATUS: &str = "0 fine, 2 an error or a wrong option.";
/// Pages of others, after our own.
const SEE_ALSO: [&str; 3] = ["ss(8)", "capabilities(7)", "tcp(7)"];
const VERSION: &str = concat!("tcptrace ", env!("CARGO_PKG_VERSION"));

fn root() -> &'static Path {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent();
    root.expect("a folder of the workspace")
}

/// Files by their paths from the root of the workspace.
type Files = BTreeMap<PathBuf, Vec<u8>>;

#[test]
fn man_pages_and_completions_are_the_same_as_the_options() {
    let (man, completions) = (Path::new("docs/man"), Path::new("deploy/completions"));
    let mut made = Files::new();
    for (name, page) in pages() {
        made.insert(man.join(name), page);
    }
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        let mut text = Vec::new();
        clap_complete::generate(shell, &mut Cli::command(), "tcptrace", &mut text);
        let name = match shell {
            Shell::Zsh => "_tcptrace",
            Shell::Fish => "tcptrace.fish",
            // As bash-completion looks for it.
            _ => "tcptrace",
        };
        made.insert(completions.join(name), text);
    }
    let update = std::env::var_os("UPDATE_GOLDEN").is_some();
    for folder in [man, completions] {
        for entry in fs::read_dir(root().join(folder)).expect("a folder") {
            let path = folder.join(entry.expect("an entry").file_name());
            if made.contains_key(&path) {
                continue;
            }
            assert!(
                update,
                "{} is of no command; `cargo xtask docs`",
                path.display()
            );
            fs::remove_file(root().join(&path)).expect("our own file");
        }
    }
    for (path, made) in made {
        let file = root().join(&path);
        if update {
            fs::write(&file, made).expect("our own file");
            continue;
        }
        let there = fs::read(&file).unwrap_or_default();
        assert!(
            there == made,
            "{} is not what the options say; `cargo xtask docs` writes it anew",
            path.display()
        );
    }
}

/// The man page of each command, by the name of its file.
fn pages() -> Vec<(String, Vec<u8>)> {
    let mut root = Cli::command().disable_help_subcommand(true);
    root.build();
    let commands: Vec<_> = std::iter::once(&root)
        .chain(root.get_subcommands())
        .collect();
    let names: Vec<String> = commands.iter().map(|command| name(command)).collect();
    let page = |command: &&clap::Command| {
        let own = name(command);
        let others = names.iter().filter(|name| **name != own);
        let others: Vec<String> = others
            .map(|name| format!("{name}(1)"))
            .chain(SEE_ALSO.map(str::to_owned))
            .collect();
        (format!("{own}.1"), page(command, &others.join(", ")))
    };
    commands.iter().map(page).collect()
}

/// `tcptrace-leaks`.
fn name(command: &clap::Command) -> String {
    let display = command.get_display_name();
    display.unwrap_or_else(|| command.get_name()).to_owned()
}

fn page(command: &clap::Command, see_also: &str) -> Vec<u8> {
    let after = After::of(command);
    let usage = command.clone().render_usage().to_string();
    let usage = usage.trim_start_matches("Usage: ").to_owned();
    let command = command.clone().override_usage(usage).mut_args(in_full);
    let has_colors = command
        .get_arguments()
        .any(|arg| arg.get_id() == "no_color");
    let has_subcommands = command.has_subcommands();
    let man = Man::new(command.clone())
        .source(VERSION)
        .manual("tcptrace Manual");

    let mut page = Vec::new();
    let to = &mut page;
    man.render_title(to).expect("a vector takes all");
    man.render_name_section(to).expect("likewise");
    man.render_synopsis_section(to).expect("likewise");
    let mut description = Roff::new();
    description.control("SH", ["DESCRIPTION"]);
    let about = command.get_long_about().or_else(|| command.get_about());
    let about = about.expect("every command says what it does").to_string();
    let paragraphs = about.split("\n\n").map(str::to_owned);
    for (number, paragraph) in paragraphs.chain(after.paragraphs).enumerate() {
        if number > 0 {
            description.control("PP", []);
        }
        let end = if paragraph.ends_with('.') { "" } else { "." };
        description.text([roman(paragraph + end)]);
    }
    description.to_writer(to).expect("likewise");
    if has_subcommands {
        man.render_subcommands_section(to).expect("likewise");
    }
    to.extend(options(&man, &command).into_bytes());
    let mut rest = Roff::new();
    if has_colors {
        rest.control("SH", ["ENVIRONMENT"]);
        rest.control("TP", []).text([bold("NO_COLOR")]);
        rest.text([roman(
            "If it is set and not empty, there are no colours, as with --no-color.",
        )]);
    }
    rest.control("SH", ["EXIT STATUS"]);
    rest.text([roman(after.exit_status.as_deref().unwrap_or(EXIT_STATUS))]);
    rest.control("SH", ["EXAMPLES"]);
    for (command, explanation) in &after.examples {
        let command = [bold(command)];
        if explanation.is_empty() {
            rest.control("PP", []).text(command);
        } else {
            rest.control("TP", []).text(command);
            rest.text([roman(explanation)]);
        }
    }
    rest.control("SH", ["SEE ALSO"]).text([roman(see_also)]);
    rest.to_writer(to).expect("likewise");
    bold_for_backticks(&String::from_utf8(page).expect("UTF-8")).into_bytes()
}

/// What stands in backticks in `--help` is bold in a page.
fn bold_for_backticks(page: &str) -> String {
    let line = |line: &str| {
        let mut bold = false;
        let parts = line.split('`').enumerate().map(|(number, part)| {
            let mark = match (number, bold) {
                (0, _) => return part.to_owned(),
                (_, false) => r"\fB",
                (_, true) => r"\fR",
            };
            bold = !bold;
            mark.to_owned() + part
        });
        parts.collect::<String>() + "\n"
    };
    page.lines().map(line).collect()
}

/// A page has room for what the short help leaves out.
fn in_full(arg: clap::Arg) -> clap::Arg {
    match arg.get_help().cloned() {
        Some(help) if arg.get_long_help().is_none() => arg.long_help(help),
        _ => arg,
    }
}

/// The sections of the options. What stands behind a heading in brackets becomes a sentence below it.
fn options(man: &Man, command: &clap::Command) -> String {
    let mut text = Vec::new();
    man.render_options_section(&mut text)
        .expect("a vector takes all");
    let mut text = String::from_utf8(text).expect("UTF-8");
    for arg in command.get_arguments() {
        let Some(heading) = arg.get_help_heading() else {
            continue;
        };
        let Some((short, note)) = heading.split_once(" (") else {
            continue;
        };
        let (first, others) = note.split_at(1);
        let sentence = first.to_uppercase() + others.trim_end_matches(')');
        text = text.replace(
            &format!(".SH \"{}\"\n", heading.to_uppercase()),
            &format!(".SH {}\n{sentence}.\n", short.to_uppercase()),
        );
    }
    text
}

/// What stands below the options in `--help`, by its parts.
#[derive(Default)]
struct After {
    /// Commands with what they are for, which may be nothing.
    examples: Vec<(String, String)>,
    exit_status: Option<String>,
    paragraphs: Vec<String>,
}

impl After {
    fn of(command: &clap::Command) -> Self {
        let text = command.get_after_help().map(ToString::to_string);
        let mut after = Self::default();
        for block in text.unwrap_or_default().split("\n\n") {
            if let Some(examples) = block.strip_prefix("Examples:\n") {
                after.examples = examples.lines().map(example).collect();
                continue;
            }
            let flowing = block.replace('\n', " ");
            match flowing.strip_prefix("Exit status: ") {
                Some(status) => after.exit_status = Some(status.to_owned()),
                None => after.paragraphs.push(flowing),
            }
        }
        let name = command.get_name();
        assert!(!after.examples.is_empty(), "{name} --help has no examples");
        after
    }
}

/// `  command    what it is for`
fn example(line: &str) -> (String, String) {
    let line = line.trim();
    let (command, explanation) = line.split_once("  ").unwrap_or((line, ""));
    (command.to_owned(), explanation.trim().to_owned())
}

#[test]
fn man_pages_have_what_a_page_has() {
    for (name, page) in pages() {
        let page = String::from_utf8(page).expect("UTF-8");
        let sections: Vec<&str> = page
            .lines()
            .filter_map(|line| line.strip_prefix(".SH "))
            .map(|section| section.trim_matches('"'))
            .collect();
        for section in [
            "NAME",
            "SYNOPSIS",
            "DESCRIPTION",
            "OPTIONS",
            "EXIT STATUS",
            "EXAMPLES",
            "SEE ALSO",
        ] {
            let times = sections.iter().filter(|there| **there == section).count();
            assert_eq!(times, 1, "{name}: {section} of {sections:?}");
        }
        // Every option is explained.
        let lines: Vec<&str> = page.lines().collect();
        for tag in lines.windows(3).filter(|lines| lines[0] == ".TP") {
            assert!(
                !tag[2].is_empty() && !tag[2].starts_with('.'),
                "{name}: {tag:?}"
            );
        }
    }
}

/// Formats every page as `man` does, in which nothing may be wrong.
#[test]
fn man_pages_are_taken_by_groff() {
    for (name, page) in pages() {
        // Plain text, without bold and underlined.
        let args = ["-man", "-Tutf8", "-P-cbou", "-ww", "-rLL=80n"];
        let Some((shown, complaints)) = filtered("groff", &args, &page) else {
            return;
        };
        assert_eq!(complaints, "", "{name}");
        let overlong = shown.lines().find(|line| line.chars().count() > 80);
        assert_eq!(overlong, None, "{name}");
    }
}

/// What `program` makes of `input`, and what it complains about; `None` where it is not installed, which is
/// said.
fn filtered(program: &str, args: &[&str], input: &[u8]) -> Option<(String, String)> {
    let file = std::env::temp_dir().join(format!("tcptrace-manual-{}", std::process::id()));
    fs::write(&file, input).expect("room");
    let run = Command::new(program).args(args).arg(&file).output();
    let _ = fs::remove_file(&file);
    let Ok(run) = run else {
        not_installed(program);
        return None;
    };
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    Some((text(run.stdout), text(run.stderr)))
}

/// Not with `eprintln`, which the test harness hides when a test passes.
fn not_installed(program: &str) {
    let _ = writeln!(
        std::io::stderr(),
        "not tested here, because {program} is not installed"
    );
}

/// What is typed before the tab key, and something that must be offered then.
const TYPED: [(&str, &str); 6] = [
    ("tcptrace le", "leaks"),
    ("tcptrace stream --lp", "--lport"),
    ("tcptrace timewait -o j", "json"),
    ("tcptrace leaks --state close", ""),
    ("tcptrace leaks --state CLOSE", "CLOSE_WAIT"),
    ("tcptrace leaks --state TIME", ""),
];

/// What a shell offers, by its own means, for what is typed. `script` gets the file and the words.
fn offered(shell: &str, script: &str, file: &str, typed: &str) -> Option<Vec<String>> {
    let run = Command::new(shell)
        .args(["-c", script])
        .args((shell == "bash").then_some(shell))
        .arg(root().join("deploy/completions").join(file))
        .args(typed.split(' '))
        .output();
    let Ok(run) = run else {
        not_installed(shell);
        return None;
    };
    let (out, err) = (
        String::from_utf8_lossy(&run.stdout).into_owned(),
        String::from_utf8_lossy(&run.stderr).into_owned(),
    );
    assert_eq!(err, "", "{shell}: {typed}");
    Some(out.lines().map(str::to_owned).collect())
}

fn assert_completes(shell: &str, script: &str, file: &str) {
    for (typed, expected) in TYPED {
        let Some(offered) = offered(shell, script, file, typed) else {
            return;
        };
        let offered: Vec<&str> = offered
            .iter()
            // fish adds a description.
            .filter_map(|line| line.split('\t').next())
            .filter(|word| !word.is_empty())
            .collect();
        if expected.is_empty() {
            assert!(
                !offered.contains(&"TIME_WAIT"),
                "{shell}: {typed}: {offered:?}"
            );
        } else {
            assert!(offered.contains(&expected), "{shell}: {typed}: {offered:?}");
        }
    }
}

#[test]
fn bash_completes() {
    // As bash itself calls the function that the file has registered.
    let script = r#"
        source "$1"; shift
        COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
        words=($(complete -p tcptrace))
        for at in "${!words[@]}"; do [[ ${words[at]} == -F ]] && function=${words[at + 1]}; done
        "$function" tcptrace "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
        printf '%s\n' "${COMPREPLY[@]}"
    "#;
    assert_completes("bash", script, "tcptrace");
}

#[test]
fn zsh_takes_the_file() {
    let path = root().join("deploy/completions/_tcptrace");
    match Command::new("zsh").arg("-n").arg(path).output() {
        Ok(run) => assert!(run.status.success(), "{run:?}"),
        Err(_) => not_installed("zsh"),
    }
}

#[test]
fn fish_completes() {
    let script = "source $argv[1]; complete -C \"$argv[2..-1]\"";
    assert_completes("fish", script, "tcptrace.fish");
}
