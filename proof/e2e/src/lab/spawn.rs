//! Starting processes of a lab: marked, out of the terminal's reach, logged.

use super::procs::{MARK, kill_process};
use crate::run::command_line;
use anyhow::{Context, Result, bail};
use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

/// Lines of standard output kept for [`Proc::wait_line`]; later ones are only logged.
const LINES_KEPT: usize = 64;

/// A process of the lab.
#[derive(Debug)]
pub struct Proc {
    name: String,
    log: PathBuf,
    child: Child,
    lines: Receiver<String>,
}

impl Proc {
    pub(super) fn start(argv: Vec<OsString>, name: &str, lab: &Path) -> Result<Proc> {
        let log = lab.join("logs").join(format!("{name}.log"));
        let mut file = File::options()
            .create(true)
            .append(true)
            .open(&log)
            .with_context(|| format!("cannot open {}", log.display()))?;
        let line = command_line(&argv);
        writeln!(file, "$ {line}").context("cannot write a log")?;
        let errors = file.try_clone().context("cannot duplicate a log's handle")?;
        let mut child = command(&argv, lab)?
            .stdout(Stdio::piped())
            .stderr(errors)
            .spawn()
            .with_context(|| format!("cannot start `{line}`"))?;
        let stdout = child.stdout.take().context("a piped standard output")?;
        let (sender, lines) = sync_channel(LINES_KEPT);
        thread::Builder::new()
            .name(format!("log-{name}"))
            .spawn(move || copy_lines(stdout, file, &sender))
            .context("cannot start a thread")?;
        Ok(Proc {
            name: name.to_owned(),
            log,
            child,
            lines,
        })
    }

    /// Its process id. `nsenter` becomes the program, so this is the program's.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Its log file.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Waits for a line on standard output that starts with `prefix`.
    ///
    /// # Errors
    /// When the process ends or `limit` passes first; the message has the log's
    /// last words and its place.
    pub fn wait_line(&mut self, prefix: &str, limit: Duration) -> Result<String> {
        let end = Instant::now() + limit;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) if line.starts_with(prefix) => return Ok(line),
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => bail!(
                    "{} did not say `{prefix}` within {} s{}",
                    self.name,
                    limit.as_secs(),
                    self.last_words()
                ),
                Err(RecvTimeoutError::Disconnected) => {
                    let status = self.wait()?;
                    bail!("{} ended with {status}{}", self.name, self.last_words())
                }
            }
        }
    }

    /// Kills it (SIGKILL by pidfd) and waits for its end.
    ///
    /// # Errors
    /// When it does not die.
    pub fn kill(&mut self) -> Result<()> {
        if self.running()? {
            kill_process(self.child.id())?;
        }
        self.wait().map(drop)
    }

    /// Whether it still runs.
    ///
    /// # Errors
    /// When its status cannot be read.
    pub fn running(&mut self) -> Result<bool> {
        let status = self.child.try_wait();
        Ok(status
            .with_context(|| format!("cannot wait for {}", self.name))?
            .is_none())
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When its status cannot be read.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        self.child
            .wait()
            .with_context(|| format!("cannot wait for {}", self.name))
    }

    fn last_words(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let last: Vec<_> = text.lines().rev().take(3).collect();
        let last: Vec<_> = last.into_iter().rev().collect();
        format!("\n  {}\n  log: {}", last.join("\n  "), self.log.display())
    }
}

/// The process that keeps a host's mount namespace alive: `cat`, which proves by
/// its echo that the namespace is there, and ends with us.
pub(super) fn holder(netns: &Path, lab: &Path) -> Result<Child> {
    let mut net = OsString::from("--net=");
    net.push(netns);
    let words = ["nsenter".into(), net, "--".into()];
    let own = ["unshare", "--mount", "--propagation", "private", "--", "cat"];
    let argv: Vec<OsString> = words.into_iter().chain(own.map(OsString::from)).collect();
    let mut child = command(&argv, lab)?
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start `nsenter` (package util-linux)")?;
    let stdin = child.stdin.as_mut().context("a piped standard input")?;
    let mut echo = String::new();
    // When it ended already, the empty echo tells.
    let _ = stdin.write_all(b"here\n");
    let stdout = child.stdout.take().context("a piped standard output")?;
    BufReader::new(stdout)
        .read_line(&mut echo)
        .context("cannot read from a host's holder")?;
    if echo.is_empty() {
        bail!("this kernel gives no mount namespace (`unshare --mount` failed)");
    }
    Ok(child)
}

fn command(argv: &[OsString], lab: &Path) -> Result<Command> {
    let (program, arguments) = argv.split_first().context("an empty command line")?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env(MARK, lab)
        // Its own group: the terminal's Ctrl-C is for us, who then end it in order.
        .process_group(0)
        .stdin(Stdio::null());
    Ok(command)
}

fn copy_lines(stdout: impl Read, mut log: File, lines: &SyncSender<String>) {
    for line in BufReader::new(stdout).lines() {
        let Ok(line) = line else { return };
        // A full disk or an unread channel must not stop the process that talks.
        let _ = writeln!(log, "{line}");
        let _ = lines.try_send(line);
    }
}
