//! A machine that is reached over SSH: what a person may do there, a program may.
//!
//! One connection is made and shared by all commands, so that a password is asked for once. Arguments are quoted for the other side's
//! shell, which SSH has no way around; nothing is interpreted on this side.

use std::{
    fs::File,
    path::PathBuf,
    process::{Output, Stdio},
    time::Duration,
};

use tokio::process::Command;

use crate::exit::{Exit, Failure};

/// Longest command but uploads and package installations.
pub(super) const SHORT: Duration = Duration::from_secs(60);
/// Longest upload or installation.
pub(super) const LONG: Duration = Duration::from_secs(900);

/// `ssh` ends with it when the connection failed.
const SSH_FAILED: i32 = 255;

/// A machine.
pub(super) struct Remote {
    /// `user@address`, as SSH takes it.
    destination: String,
    options: Vec<String>,
    /// Holds the shared connection's socket; 0700.
    control: PathBuf,
    /// What makes a command root's.
    root: &'static [&'static str],
}

impl Remote {
    /// Connects, and finds out how to be root there.
    pub(super) async fn connect(destination: &str, port: Option<u16>, key: Option<&PathBuf>) -> Result<Self, Failure> {
        let control = control_directory()?;
        let mut options = vec![
            "-oControlMaster=auto".to_owned(),
            format!("-oControlPath={}/s", control.display()),
            "-oControlPersist=60".to_owned(),
            "-oConnectTimeout=15".to_owned(),
        ];
        options.extend(port.map(|port| format!("-p{port}")));
        if let Some(key) = key {
            options.extend([
                "-i".to_owned(),
                key.display().to_string(),
                "-oIdentitiesOnly=yes".to_owned(),
            ]);
        }
        let mut remote = Self {
            destination: destination.to_owned(),
            options,
            control,
            root: &[],
        };
        let system = remote.text(&["uname", "-sm"]).await?;
        if system != "Linux x86_64" {
            let message = format!("{destination} is {system}; hosts are Linux x86_64");
            return Err(Failure::new(Exit::Failed, message));
        }
        if remote.text(&["id", "-u"]).await? != "0" {
            remote.root = &["sudo", "-n"];
            let may = remote.run(&["true"], None, SHORT).await?;
            if !may.status.success() {
                let message = format!(
                    "{destination} is not root there, and sudo asks for a password: {}",
                    said(&may)
                );
                return Err(Failure::new(Exit::Failed, message)
                    .hint("log in as root, or let this user use sudo without a password"));
            }
        }
        Ok(remote)
    }

    /// Runs a command there as root, with a file as its input.
    pub(super) async fn run(&self, words: &[&str], input: Option<File>, longest: Duration) -> Result<Output, Failure> {
        let line: Vec<String> = self.root.iter().chain(words).map(|word| quoted(word)).collect();
        let mut ssh = Command::new("ssh");
        ssh.args(&self.options)
            .arg("--")
            .arg(&self.destination)
            .arg(line.join(" "));
        ssh.stdin(input.map_or_else(Stdio::null, Stdio::from))
            .kill_on_drop(true);
        // Asked for on the terminal: a password, or whether a new machine's key is right.
        let output = tokio::time::timeout(longest, ssh.output()).await;
        let output = output.map_err(|_| {
            let message = format!(
                "`{}` on {} took longer than {} s",
                words.join(" "),
                self.destination,
                longest.as_secs()
            );
            Failure::new(Exit::TimedOut, message)
        })?;
        let output = output.map_err(|error| {
            Failure::new(Exit::Failed, format!("cannot start ssh: {error}")).hint("install openssh-client")
        })?;
        if output.status.code() == Some(SSH_FAILED) {
            let message = format!("no SSH to {}: {}", self.destination, said(&output));
            return Err(
                Failure::new(Exit::Unreachable, message).hint(format!("see that this works: ssh {}", self.destination))
            );
        }
        Ok(output)
    }

    /// What a command prints that must end well.
    pub(super) async fn text(&self, words: &[&str]) -> Result<String, Failure> {
        let output = self.done(words, None, SHORT).await?;
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    /// Runs a command that must end well.
    pub(super) async fn done(&self, words: &[&str], input: Option<File>, longest: Duration) -> Result<Output, Failure> {
        let output = self.run(words, input, longest).await?;
        if output.status.success() {
            return Ok(output);
        }
        let message = format!(
            "`{}` on {} failed: {}",
            words.join(" "),
            self.destination,
            said(&output)
        );
        Err(Failure::new(Exit::Failed, message))
    }

    /// Writes a file there, whole or not at all.
    pub(super) async fn write(&self, path: &str, mode: &str, bytes: &[u8]) -> Result<(), Failure> {
        let failed = |error: std::io::Error| Failure::new(Exit::Failed, format!("cannot prepare {path}: {error}"));
        let draft = self.control.join("draft");
        std::fs::write(&draft, bytes).map_err(failed)?;
        let file = File::open(&draft).map_err(failed)?;
        self.upload(path, mode, file).await
    }

    /// Puts a file there, whole or not at all, in place of one that may be running.
    pub(super) async fn upload(&self, path: &str, mode: &str, file: File) -> Result<(), Failure> {
        let draft = format!("{path}.new");
        self.done(&["install", "-D", "-m", mode, "/dev/stdin", &draft], Some(file), LONG)
            .await?;
        self.done(&["mv", "-f", &draft, path], None, SHORT).await.map(|_| ())
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        let mut end = std::process::Command::new("ssh");
        end.args(&self.options).args(["-O", "exit", "--", &self.destination]);
        // The connection ends by itself a minute later, and the directory is a temporary one.
        let _ = end.stdin(Stdio::null()).output();
        let _ = std::fs::remove_dir_all(&self.control);
    }
}

/// The last line of what a command said.
pub(super) fn said(output: &Output) -> String {
    let both = [&output.stderr, &output.stdout].map(|text| String::from_utf8_lossy(text).trim().to_owned());
    let spoken = both.iter().find(|text| !text.is_empty());
    spoken
        .and_then(|text| text.lines().last())
        .unwrap_or("it said nothing")
        .to_owned()
}

/// A word as a POSIX shell takes it unchanged.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// A new directory that only this user enters. Short: the name of a socket has at most 107 bytes.
fn control_directory() -> Result<PathBuf, Failure> {
    use std::os::unix::fs::DirBuilderExt as _;
    let path = std::env::temp_dir().join(format!("godwit-{}", uuid::Uuid::now_v7().simple()));
    let made = std::fs::DirBuilder::new().mode(0o700).create(&path);
    made.map(|()| path.clone())
        .map_err(|error| Failure::new(Exit::Failed, format!("cannot make {}: {error}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_reach_the_other_side_as_they_are() {
        for word in ["plain", "a b", "it's", "$(id)", "; rm -rf /", "`x`", "\\", "*", ""] {
            let output = std::process::Command::new("sh")
                .arg("-c")
                .arg(format!("printf %s {}", quoted(word)))
                .output();
            assert_eq!(String::from_utf8_lossy(&output.unwrap().stdout), word);
        }
    }
}
