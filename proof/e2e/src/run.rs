//! External programs: run from argument vectors, their words kept for the error.

use anyhow::{Context, Result, bail};
use std::ffi::OsStr;
use std::io::Write;
use std::process::{Command, Stdio};

/// Runs a program to its end and returns its standard output.
///
/// # Errors
/// When it cannot be started, or ends with another status than 0; the message
/// has the whole command line and what the program said.
pub fn run<S: AsRef<OsStr>>(argv: &[S]) -> Result<String> {
    start(argv, "", &[])
}

/// As [`run`], with variables added to the environment.
///
/// # Errors
/// As [`run`].
pub fn run_env<S: AsRef<OsStr>>(argv: &[S], environment: &[(&str, String)]) -> Result<String> {
    start(argv, "", environment)
}

/// As [`run`], with `input` given on standard input.
///
/// # Errors
/// As [`run`].
pub fn run_with_input<S: AsRef<OsStr>>(argv: &[S], input: &str) -> Result<String> {
    start(argv, input, &[])
}

fn start<S: AsRef<OsStr>>(argv: &[S], input: &str, environment: &[(&str, String)]) -> Result<String> {
    let (program, arguments) = argv.split_first().context("an empty command line")?;
    let line = command_line(argv);
    let mut child = Command::new(program)
        .args(arguments)
        .envs(environment.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start `{line}`"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that ends without reading is judged by its status.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child
        .wait_with_output()
        .with_context(|| format!("cannot read what `{line}` says"))?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(stdout);
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    let said = if stderr.trim().is_empty() {
        stdout.trim()
    } else {
        stderr.trim()
    };
    bail!("`{line}` ended with {}: {said}", output.status)
}

/// The command line as a person would type it, for messages.
pub fn command_line<S: AsRef<OsStr>>(argv: &[S]) -> String {
    let words: Vec<_> = argv
        .iter()
        .map(|word| word.as_ref().to_string_lossy().into_owned())
        .collect();
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_program_is_quoted_with_its_words() {
        let error = run(&["ls", "/no-such-place"]).unwrap_err().to_string();
        assert!(error.contains("ls /no-such-place"), "{error}");
        assert!(error.contains("No such file"), "{error}");
    }

    #[test]
    fn input_reaches_the_program() {
        assert_eq!(run_with_input(&["cat"], "a\nb").unwrap(), "a\nb");
    }
}
