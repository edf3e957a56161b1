//! `cargo xtask test`: every check in turn, cheapest first, stopping at the first that fails.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::launch::BINARY;
use crate::run::{capture, cargo, find, is_root, run, sudo_is_silent, target_dir, watch, with_sudo};
use crate::second_qemu::{Second, VARIABLE, second_qemu};
use crate::setup::{self, Purpose};
use crate::tally::Tally;
use crate::tidy;

/// One step of the whole.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, clap::ValueEnum)]
pub(crate) enum Step {
    /// The programs and the tool chain's components.
    Setup,
    /// `cargo fmt --check`
    Fmt,
    /// The house rules.
    Tidy,
    /// Lints, warnings as errors.
    Clippy,
    /// Bans, licences and sources of third-party crates; advisories when they can be fetched.
    Deny,
    /// Unit and property tests.
    Unit,
    /// The simulator's seeds.
    Sim,
    /// Real QEMU in namespaces.
    E2e,
}

const STEPS: [Step; 8] = [
    Step::Setup,
    Step::Fmt,
    Step::Tidy,
    Step::Clippy,
    Step::Deny,
    Step::Unit,
    Step::Sim,
    Step::E2e,
];

/// The file to which a test that cannot run here adds a line `NAME: WHY` before it returns. libtest knows no
/// skipping at run time, and a test that did not check anything must not be counted as passed.
const LEFT_OUT: &str = "GODWIT_LEFT_OUT";

/// How long the advisory database may take to arrive.
const ADVISORIES_S_MAX: &str = "90";

/// Runs the steps, or only the named ones, and ends with the line `N passed, N failed`.
///
/// # Errors
/// The first step that failed, and how to run it alone.
pub(crate) fn test(only: &[Step], yes: bool) -> Result<()> {
    let steps: Vec<Step> = STEPS
        .into_iter()
        .filter(|step| only.is_empty() || only.contains(step))
        .collect();
    let mut tally = Tally::default();
    let mut ended = Vec::new();
    let mut failure = None;
    for step in &steps {
        println!("\n== {}", step.name());
        let start = Instant::now();
        let failed_before = tally.failed;
        let outcome = step.run(&mut tally, yes);
        ended.push((*step, start.elapsed(), outcome.is_ok()));
        if let Err(error) = outcome {
            // A step that failed without a failed test (a lint, a build) still has to show in the count.
            tally.failed = tally.failed.max(failed_before + 1);
            failure = Some((*step, error));
            break;
        }
    }
    // Whoever has only the end of the output finds there all that matters.
    println!("\n{}", summary(&steps, &ended));
    for line in &tally.left_out {
        println!("left out: {line}");
    }
    if tally.ignored > 0 {
        println!("ignored by libtest: {}", tally.ignored);
    }
    let failures = tally.failures();
    if !failures.is_empty() {
        println!("{failures}");
    }
    if let Some((step, error)) = &failure {
        println!("step {} failed: {error:#}", step.name());
    }
    println!("{tally}");
    match failure {
        None => Ok(()),
        Some((step, error)) => Err(error.context(format!(
            "step {0} failed; alone: cargo xtask test --only {0}",
            step.name()
        ))),
    }
}

/// A line for each step: how long it took and how it ended.
fn summary(steps: &[Step], ended: &[(Step, Duration, bool)]) -> String {
    let line = |step: &Step| match ended.iter().find(|(one, _, _)| one == step) {
        Some((_, time, well)) => {
            let how = if *well { "ok" } else { "FAILED" };
            format!("{:<8} {:>7.1} s  {how}", step.name(), time.as_secs_f64())
        }
        None => format!("{:<8}            not run", step.name()),
    };
    let mut lines: Vec<String> = steps.iter().map(line).collect();
    let whole: Duration = ended.iter().map(|(_, time, _)| *time).sum();
    lines.push(format!("{:<8} {:>7.1} s", "whole", whole.as_secs_f64()));
    lines.join("\n")
}

impl Step {
    fn name(self) -> &'static str {
        match self {
            Self::Setup => "setup",
            Self::Fmt => "fmt",
            Self::Tidy => "tidy",
            Self::Clippy => "clippy",
            Self::Deny => "deny",
            Self::Unit => "unit",
            Self::Sim => "sim",
            Self::E2e => "e2e",
        }
    }

    fn run(self, tally: &mut Tally, yes: bool) -> Result<()> {
        match self {
            Self::Setup => setup::ensure(Purpose::Test, yes).and_then(|()| setup::ensure_components()),
            Self::Fmt => run(cargo().args(["fmt", "--all", "--check"])),
            Self::Tidy => tidy::run(),
            Self::Clippy => run(cargo().args([
                "clippy",
                "--locked",
                "--workspace",
                "--all-targets",
                "--",
                "-D",
                "warnings",
            ])),
            Self::Deny => deny(),
            Self::Unit => {
                let mut command = cargo();
                command.args([
                    "test",
                    "--locked",
                    "--no-fail-fast",
                    "--workspace",
                    "--exclude",
                    "sim",
                    "--exclude",
                    "e2e",
                ]);
                libtest(command, tally, As::User)
            }
            Self::Sim => {
                let mut command = cargo();
                command.args(["test", "--locked", "--no-fail-fast", "-p", "sim"]);
                libtest(command, tally, As::User)
            }
            Self::E2e => end_to_end(tally),
        }
    }
}

/// Who runs the tests.
#[derive(PartialEq)]
enum As {
    User,
    Root,
}

/// Runs a command that runs tests, and counts them.
fn libtest(mut command: Command, tally: &mut Tally, who: As) -> Result<()> {
    if let Second::Here(dir, _) = second_qemu()? {
        command.env(VARIABLE, dir);
    }
    let target = target_dir()?;
    fs::create_dir_all(&target).with_context(|| format!("cannot create {}", target.display()))?;
    count(command, &target.join("left-out.txt"), tally, who)
}

/// Runs the command with `notes` for what is left out, and adds up both.
fn count(mut command: Command, notes: &Path, tally: &mut Tally, who: As) -> Result<()> {
    fs::write(notes, "").with_context(|| format!("cannot write {}", notes.display()))?;
    command.env(LEFT_OUT, notes);
    if who == As::Root && !is_root() {
        command = with_sudo(&command);
    }
    let ended_well = watch(&mut command, |line| tally.see(line))?;
    let noted = fs::read_to_string(notes).with_context(|| format!("cannot read {}", notes.display()))?;
    tally.left_out.extend(noted.lines().map(str::to_owned));
    if !ended_well {
        bail!("tests failed or did not build");
    }
    Ok(())
}

/// Builds as the user, runs as root: the hosts are namespaces.
fn end_to_end(tally: &mut Tally) -> Result<()> {
    if !is_root() && !sudo_is_silent() {
        bail!("end-to-end tests make network namespaces, which need root: run `sudo -v` first, or as root");
    }
    run(cargo().args(["build", "--locked", "--release", "-p", "godwit"]))?;
    let godwit = target_dir()?.join("release/godwit");
    let programs = test_programs("e2e")?;
    if programs.is_empty() {
        bail!("the crate e2e has no tests");
    }
    if let Second::CannotBeHad(why) = second_qemu()? {
        println!("no other QEMU: {why}; tests across versions are left out");
    }
    let mut failed = Vec::new();
    for program in programs {
        println!("-- {}", program.name);
        let mut command = Command::new(&program.executable);
        command
            .arg("--test-threads=1")
            .current_dir(&program.dir)
            .env(BINARY, &godwit);
        command.env("CARGO_MANIFEST_DIR", &program.dir);
        if let Err(error) = libtest(command, tally, As::Root) {
            failed.push(format!("{}: {error:#}", program.name));
        }
    }
    if !failed.is_empty() {
        bail!("{}", failed.join("; "));
    }
    Ok(())
}

struct TestProgram {
    name: String,
    executable: PathBuf,
    dir: PathBuf,
}

/// Builds a package's tests and returns their programs, as cargo's own messages name them.
fn test_programs(package: &str) -> Result<Vec<TestProgram>> {
    let mut command = cargo();
    command.args([
        "test",
        "--locked",
        "-p",
        package,
        "--no-run",
        "--message-format=json-render-diagnostics",
    ]);
    command.stderr(std::process::Stdio::inherit());
    let text = capture(&mut command)?;
    Ok(text.lines().filter_map(test_program).collect())
}

fn test_program(line: &str) -> Option<TestProgram> {
    #[derive(Deserialize)]
    struct Message {
        reason: String,
        executable: Option<PathBuf>,
        manifest_path: Option<PathBuf>,
        target: Option<Target>,
        profile: Option<Profile>,
    }
    #[derive(Deserialize)]
    struct Target {
        name: String,
    }
    #[derive(Deserialize)]
    struct Profile {
        test: bool,
    }
    let message: Message = serde_json::from_str(line).ok()?;
    if message.reason != "compiler-artifact" || !message.profile?.test {
        return None;
    }
    let dir = message.manifest_path?.parent()?.to_path_buf();
    Some(TestProgram {
        name: message.target?.name,
        executable: message.executable?,
        dir,
    })
}

/// cargo-deny over `deny.toml`; it is built once below the target directory when it is not installed.
fn deny() -> Result<()> {
    let program = match find("cargo-deny") {
        Some(program) => program,
        None => {
            let tools = target_dir()?.join("tools");
            let program = tools.join("bin/cargo-deny");
            if !program.exists() {
                println!("building cargo-deny, once");
                run(cargo()
                    .args(["install", "--quiet", "--locked", "cargo-deny", "--root"])
                    .arg(&tools))?;
            }
            program
        }
    };
    let deny = || {
        let mut command = Command::new(&program);
        command.current_dir(crate::run::root());
        command
    };
    // The check itself reads only what is on this machine; what it reads is fetched first.
    run(cargo().args(["fetch", "--locked"]))?;
    run(deny().args([
        "--locked",
        "--offline",
        "check",
        "--hide-inclusion-graph",
        "bans",
        "licenses",
        "sources",
    ]))?;
    // A clone of the advisories needs their forge; a machine without that way out still runs all the rest.
    let mut fetch = Command::new("timeout");
    fetch
        .current_dir(crate::run::root())
        .arg(ADVISORIES_S_MAX)
        .arg(&program)
        .args(["fetch", "db"]);
    if crate::run::succeeds(&mut fetch) {
        return run(deny().args(["--locked", "--offline", "check", "advisories"]));
    }
    println!("advisories: left out, their database cannot be fetched from here");
    Ok(())
}

/// The names of all steps, for the guide's test.
#[cfg(test)]
fn names() -> Vec<&'static str> {
    STEPS.iter().map(|step| step.name()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_tells_of_each_step_how_it_ended() {
        let ended = [
            (Step::Setup, Duration::from_millis(1500), true),
            (Step::Unit, Duration::from_secs(300), false),
        ];
        assert_eq!(
            summary(&[Step::Setup, Step::Unit, Step::E2e], &ended),
            "setup        1.5 s  ok\nunit       300.0 s  FAILED\ne2e                 not run\nwhole      301.5 s"
        );
    }

    #[test]
    fn what_a_test_program_notes_as_left_out_is_read_and_its_failure_is_one() {
        let notes = std::env::temp_dir().join(format!("godwit-left-out-test-{}", std::process::id()));
        let program = |code: u8| {
            let mut command = Command::new("sh");
            let script =
                "echo 'test result: ok. 2 passed; 0 failed; 0 ignored'; echo 'across: none' >> $GODWIT_LEFT_OUT";
            command.args(["-c", &format!("{script}; exit {code}")]);
            command
        };
        let mut tally = Tally::default();
        count(program(0), &notes, &mut tally, As::User).unwrap();
        assert_eq!(
            (tally.to_string().as_str(), tally.left_out.as_slice()),
            ("1 passed, 0 failed", &["across: none".into()][..])
        );
        assert!(count(program(1), &notes, &mut tally, As::User).is_err());
        fs::remove_file(&notes).unwrap();
    }

    #[test]
    fn test_programs_are_told_from_other_artifacts() {
        let line = |test: bool| {
            format!(
                r#"{{"reason":"compiler-artifact","executable":"/t/ring-1","manifest_path":"/w/proof/e2e/Cargo.toml",
                "target":{{"name":"ring"}},"profile":{{"test":{test}}},"more":1}}"#
            )
        };
        let program = test_program(&line(true)).unwrap();
        assert_eq!(
            (program.name.as_str(), program.dir.to_str()),
            ("ring", Some("/w/proof/e2e"))
        );
        assert!(test_program(&line(false)).is_none());
        assert!(test_program("warning: text").is_none());
    }

    #[test]
    fn the_guide_names_every_step() {
        let guide = fs::read_to_string(crate::run::root().join("CONTRIBUTING.md")).unwrap();
        for name in names() {
            assert!(
                guide.contains(&format!("`{name}`")),
                "CONTRIBUTING.md does not name the step {name}"
            );
        }
    }
}
