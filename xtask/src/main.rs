//! Development commands: demo, test, bench, tidy, release, and the set-up they need.
//!
//! ```text
//!   cargo xtask NAME
//!        |
//!        +-- setup --> apt (simulate, then install)      demo, bench --> target/release/{demo,NAME}
//!        +-- qemu ---> second_qemu (unpack, never install)
//!        +-- release ---> target/dist: package, archive, bill of materials, checksums
//!        +-- test ---> fmt, tidy, clippy, deny, unit, sim, e2e
//! ```
//!
//! Invariants
//! - Depends on none of our crates and on few others: it is the first thing a new machine builds.
//! - Nothing is installed without root's or the user's yes, and apt's configuration is left as it was.
//! - A check that cannot run here says so in one line and is counted as left out, never as passed.

mod apt;
mod checks;
mod launch;
mod release;
mod run;
mod second_qemu;
mod setup;
mod tally;
mod tidy;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};

use checks::Step;
use setup::{NeedsConsent, Purpose};

/// Packages are missing and there was no yes to install them.
const EXIT_NEEDS_CONSENT: u8 = 3;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Development commands of Godwit", after_help = EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    command: Task,
    /// Install missing packages through sudo without asking.
    #[arg(long, global = true)]
    yes: bool,
}

const EXIT_CODES: &str = "Exit codes: 0 well; 1 something failed; 2 wrong arguments; 3 packages are missing and there was no yes to install them.";

#[derive(Subcommand)]
enum Task {
    /// Watch a web server in a real VM move between three hosts on this machine.
    Demo(Passed),
    /// Everything that has to hold: format, lints, tidy, dependencies, tests, simulator, end to end.
    Test {
        /// Only these steps, in their usual order.
        #[arg(long, value_enum, value_delimiter = ',')]
        only: Vec<Step>,
    },
    /// Measure side by side; prints a table and can write JSON.
    Bench {
        /// Which measurement, for example `migrate`.
        name: String,
        /// Install the peers to measure against (libvirt).
        #[arg(long)]
        install: bool,
        #[command(flatten)]
        passed: Passed,
    },
    /// Make what people install: Debian package, archive, bill of materials, checksums.
    Release {
        /// Directory that it is written to; without it, `target/dist`.
        #[arg(long, value_name = "DIR")]
        out: Option<std::path::PathBuf>,
    },
    /// Check the house rules.
    Tidy,
    /// Look for the programs a command needs, and install the missing ones.
    Setup {
        /// What they are for.
        #[arg(value_enum, default_value = "test")]
        purpose: Purpose,
        /// Only show the table.
        #[arg(long)]
        list: bool,
    },
    /// Show the system's QEMU and the other version used by tests.
    Qemu,
}

#[derive(Args)]
struct Passed {
    /// Handed on to the program; `-- --help` shows what it takes (demo: `--exit`, `--json FILE`).
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGUMENTS")]
    words: Vec<String>,
}

fn main() -> ExitCode {
    match dispatch(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            let code = if error.downcast_ref::<NeedsConsent>().is_some() {
                EXIT_NEEDS_CONSENT
            } else {
                1
            };
            ExitCode::from(code)
        }
    }
}

fn dispatch(cli: Cli) -> Result<()> {
    match cli.command {
        Task::Demo(passed) => launch::demo(&passed.words, cli.yes),
        Task::Test { only } => checks::test(&only, cli.yes),
        Task::Bench { name, install, passed } => launch::bench(&name, install, &passed.words, cli.yes),
        Task::Release { out } => release::release(out, cli.yes),
        Task::Tidy => tidy::run(),
        Task::Setup { purpose, list: true } => {
            setup::list(purpose);
            Ok(())
        }
        Task::Setup { purpose, list: false } => setup::ensure(purpose, cli.yes),
        Task::Qemu => second_qemu::report(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        <Cli as clap::CommandFactory>::command().debug_assert();
        let cli = Cli::parse_from(["xtask", "demo", "--exit", "--json", "out.json"]);
        assert!(matches!(cli.command, Task::Demo(Passed { words }) if words == ["--exit", "--json", "out.json"]));
    }
}
