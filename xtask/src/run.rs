//! Running other programs: argument vectors, never a shell; errors name the command.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

/// The repository's root: the folder above this crate.
pub(crate) fn root() -> PathBuf {
    let here = std::env::var_os("CARGO_MANIFEST_DIR")
        .map(PathBuf::from)
        .unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")));
    here.parent().map(Path::to_path_buf).unwrap_or(here)
}

/// The cargo that started us, so that the same tool chain goes on.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

/// Cargo's target directory, wherever the user's configuration puts it.
pub(crate) fn target_dir() -> Result<PathBuf> {
    #[derive(Deserialize)]
    struct Metadata {
        target_directory: PathBuf,
    }
    let text = capture(cargo().args(["metadata", "--no-deps", "--format-version", "1"]))?;
    let metadata: Metadata = serde_json::from_str(&text).context("cannot read what `cargo metadata` printed")?;
    Ok(metadata.target_directory)
}

/// Whether this process runs as root: `/proc/self` belongs to the effective user.
pub(crate) fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|meta| meta.uid() == 0)
}

/// Whether `sudo` would run a command now without asking for a password.
pub(crate) fn sudo_is_silent() -> bool {
    find("sudo").is_some() && succeeds(Command::new("sudo").args(["-n", "true"]))
}

/// Finds a program in `PATH` and in the system folders that an ordinary user's `PATH` leaves out on Debian.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        .map(|dir| dir.join(program))
        .find(|file| std::fs::metadata(file).is_ok_and(|meta| meta.is_file() && meta.mode() & 0o111 != 0))
}

/// Runs a command to its end with our own terminal.
///
/// # Errors
/// When it cannot be started or ends with a failure.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("cannot start `{}`", line(command)))?;
    if !status.success() {
        bail!("`{}` ended with {status}", line(command));
    }
    Ok(())
}

/// Runs a command quietly and tells whether it ended well.
pub(crate) fn succeeds(command: &mut Command) -> bool {
    command
        .stdin(Stdio::null())
        .output()
        .is_ok_and(|output| output.status.success())
}

/// Runs a command and returns what it printed.
///
/// # Errors
/// When it cannot be started or ends with a failure; the message carries the last lines it printed.
pub(crate) fn capture(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start `{}`", line(command)))?;
    if !output.status.success() {
        // Apt writes its reasons to standard output: the last lines of both.
        let said: Vec<_> = [&output.stdout, &output.stderr].map(|text| tail(text, 4)).into();
        bail!(
            "`{}` ended with {}: {}",
            line(command),
            output.status,
            said.join("\n").trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn tail(text: &[u8], count: usize) -> String {
    let text = String::from_utf8_lossy(text);
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

/// Runs a command, passes its standard output through, and shows each line of it to `see`.
/// Returns whether it ended well.
///
/// # Errors
/// When it cannot be started or its output cannot be read.
pub(crate) fn watch(command: &mut Command, mut see: impl FnMut(&str)) -> Result<bool> {
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start `{}`", line(command)))?;
    let stdout = child.stdout.take().context("the child has no standard output")?;
    let mut reader = BufReader::new(stdout);
    let mut bytes = Vec::new();
    while reader.read_until(b'\n', &mut bytes)? > 0 {
        let text = String::from_utf8_lossy(&bytes);
        let text = text.trim_end_matches('\n');
        println!("{text}");
        see(text);
        bytes.clear();
    }
    Ok(child.wait()?.success())
}

/// The same command through sudo. Sudo clears the environment, so what the command was given is named again.
pub(crate) fn with_sudo(command: &Command) -> Command {
    let mut sudo = Command::new("sudo");
    let mut given = command.get_envs().peekable();
    if given.peek().is_some() {
        sudo.arg("env");
    }
    for (key, value) in given {
        sudo.arg(format!("{}={}", key.display(), value.unwrap_or_default().display()));
    }
    sudo.arg(command.get_program()).args(command.get_args());
    if let Some(dir) = command.get_current_dir() {
        sudo.current_dir(dir);
    }
    sudo
}

/// The command as a person would type it.
pub(crate) fn line(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(quoted)
        .collect::<Vec<_>>()
        .join(" ")
}

fn quoted(word: &OsStr) -> String {
    let word = word.to_string_lossy();
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=./:,+@%~".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.into_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_shown_as_it_would_be_typed() {
        let mut command = Command::new("apt-get");
        command.args(["-o", "A=b c", "it's", ""]);
        assert_eq!(line(&command), r"apt-get -o 'A=b c' 'it'\''s' ''");
    }

    #[test]
    fn sudo_is_told_the_environment_it_would_clear() {
        let mut command = Command::new("apt-get");
        command.env("LC_ALL", "C").arg("update").current_dir("/");
        let sudo = with_sudo(&command);
        assert_eq!(line(&sudo), "sudo env LC_ALL=C apt-get update");
        assert_eq!(sudo.get_current_dir(), Some(Path::new("/")));
        assert_eq!(line(&with_sudo(&Command::new("id"))), "sudo id");
    }

    #[test]
    fn a_failed_command_says_what_it_said() {
        let error = capture(Command::new("ls").arg("/nowhere-at-all"))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("`ls /nowhere-at-all`") && error.contains("No such file"),
            "{error}"
        );
    }

    #[test]
    fn every_line_of_output_is_seen_even_the_one_without_an_end() {
        let mut seen = Vec::new();
        let ended_well = watch(Command::new("printf").arg("a\\nb"), |text| seen.push(text.to_owned())).unwrap();
        assert!(ended_well);
        assert_eq!(seen, ["a", "b"]);
    }

    #[test]
    fn a_program_that_is_nowhere_is_not_found() {
        assert!(find("sh").is_some());
        assert!(find("no-such-program-at-all").is_none());
    }
}
