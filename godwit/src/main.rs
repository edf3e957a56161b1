//! Godwit: provisions virtual machines on a pool of hosts and moves them while they run. This binary is all of it: controller,
//! agent, both at once, and the command line.
//!
//! ```text
//!   godwit up ─────────┬─▶ controller ◀── rest ◀── HTTPS ── client ◀── commands ◀── godwit vm, host, template, op, ...
//!   godwit controller ─┘        ▲                                          └──▶ out: table, JSON, YAML, progress
//!   godwit doctor ──▶ doctor: this machine
//!   godwit agent ───────────────┘ ── starts ──▶ godwit tunnel (one for each end of a migration)
//! ```
//!
//! Invariants:
//! - The tunnel starts before anything else is built: a guest's migration waits for it.
//! - What a server says is printed with its control characters made visible; what a client says goes to standard error.
//! - Each way of failing has its exit code (`godwit help exit-codes`), and says what failed, why, and what to do next.
//! - A closed standard output ends a command quietly.

mod cli;
mod client;
mod commands;
mod config;
mod doctor;
mod exit;
mod follow;
mod notify;
mod out;
mod shutdown;

use std::{
    ffi::OsString,
    io::{IsTerminal as _, Write as _},
    path::Path,
    process::ExitCode,
};

use clap_complete::CompleteEnv;
use tracing_subscriber::EnvFilter;

use cli::{Cli, Command};
use exit::{Exit, Failure};

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    if arguments.get(1).is_some_and(|word| word == "tunnel") {
        return tunnel(&arguments[2..]);
    }
    if let Some(at) = arguments.iter().position(|word| word.to_str().is_none()) {
        return Failure::new(Exit::Usage, format!("argument {at} is not UTF-8"))
            .hint("give names in UTF-8")
            .report();
    }
    CompleteEnv::with_factory(cli::command).complete();
    let arguments = match config::expanded(arguments) {
        Ok(arguments) => arguments,
        Err(failure) => return failure.report(),
    };
    match cli::parse(&arguments) {
        Ok(cli) => run(cli),
        Err(error) => {
            // A closed terminal is no reason to fail differently.
            let _ = complain(&arguments, &error);
            ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
        }
    }
}

/// How the tokens begin with which hosts join, and what is shown in their place: they would land in a log.
const SECRET_BEGINS: &str = "gwj1.";
const SECRET_SHOWN: &str = "gwj1.(not shown)";

/// Says what is wrong with a command line, without what a terminal would obey, and without the secret in it.
fn complain(arguments: &[OsString], error: &clap::Error) -> std::io::Result<()> {
    let words: Vec<String> = arguments
        .iter()
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    let shown: Vec<String> = words.iter().map(|word| out::safe::text(word)).collect();
    let again = (words != shown).then(|| cli::parse(&shown).err()).flatten();
    let error = again.as_ref().unwrap_or(error);
    match secret_in(&words) {
        Some(secret) => write!(std::io::stderr(), "{}", error.to_string().replace(secret, SECRET_SHOWN)),
        None => error.print(),
    }
}

/// The token in a command line: a word of its form wherever it stands, else what `--join` has before its `@`, or all of it.
fn secret_in(words: &[String]) -> Option<&str> {
    let of_its_form = words
        .iter()
        .find_map(|word| Some(word.split_at(word.find(SECRET_BEGINS)?).1));
    let joining = || {
        let at = words
            .iter()
            .position(|word| word == "--join" || word.starts_with("--join="))?;
        words[at]
            .strip_prefix("--join=")
            .or_else(|| words.get(at + 1).map(String::as_str))
    };
    let value = of_its_form.or_else(joining)?;
    value.split('@').next().filter(|secret| !secret.is_empty())
}

/// One end of a migration. Called by the agent, with exactly `--spec PATH`.
fn tunnel(words: &[OsString]) -> ExitCode {
    let [flag, spec] = words else {
        return Failure::new(Exit::Usage, "tunnel takes --spec PATH; agents start it, people do not").report();
    };
    if flag != "--spec" {
        return Failure::new(Exit::Usage, "tunnel takes --spec PATH; agents start it, people do not").report();
    }
    match agent::tunnel::main(Path::new(spec)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => Failure::of(Exit::Failed, &error).report(),
    }
}

fn run(cli: Cli) -> ExitCode {
    let serves = matches!(cli.command, Command::Up(_) | Command::Controller(_) | Command::Agent(_));
    log(if serves { "info" } else { "error" });
    let runtime = if serves {
        tokio::runtime::Builder::new_multi_thread().enable_all().build()
    } else {
        tokio::runtime::Builder::new_current_thread().enable_all().build()
    };
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => return Failure::of(Exit::Failed, &error).report(),
    };
    let ended = runtime.block_on(commands::run(cli));
    // A read of the terminal may be under way for ever.
    runtime.shutdown_background();
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

/// Logs go to standard error, from the level that `GODWIT_LOG` gives (`info`, `agent=debug`, ...).
fn log(default: &str) {
    let filter = EnvFilter::try_from_env("GODWIT_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    let logs = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal());
    // Fails only where a log was set up before; there is none.
    let _ = logs.with_writer(std::io::stderr).try_init();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_secret_of_a_join_is_found_with_and_without_its_beginning() {
        let secret = |line: &str| {
            let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
            secret_in(&words).map(str::to_owned)
        };
        for line in [
            "agent --join gwj1.abc@h:1x",
            "agent --join=gwj1.abc@h:1x",
            "--mtu 1 agent --join gwj1.abc",
        ] {
            assert_eq!(secret(line).as_deref(), Some("gwj1.abc"), "{line}");
        }
        assert_eq!(secret("agent --join AaH6@10.0.0.1:x").as_deref(), Some("AaH6"));
        assert_eq!(secret("agent gwj1.abc@10.0.0.1:1").as_deref(), Some("gwj1.abc"));
        assert_eq!(secret("agent --join"), None);
        assert_eq!(secret("vm list"), None);
    }
}
