//! Runs helper programs from argument vectors: bounded output, a deadline, optional resource limits.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// What is kept of a program's standard output, and of its standard error.
const OUTPUT_BYTES_MAX: u64 = 8 << 20;
const PIECE_BYTES: usize = 64 << 10;
/// How much of a program's complaint goes into an error message.
const COMPLAINT_CHARS_MAX: usize = 400;

/// Limits that the kernel enforces on the program (setrlimit(2)).
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Address space in bytes.
    pub address_space_bytes: u64,
    /// Processor time in seconds.
    pub cpu_s: u64,
    /// The largest file it may write, in bytes.
    pub file_bytes: u64,
}

/// Why a program gave no good result.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// It could not be started.
    #[error("cannot start {program}; is its package installed?")]
    Start {
        /// The program's name.
        program: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It could not be waited for, or its output not be read.
    #[error("lost track of {program}")]
    Wait {
        /// The program's name.
        program: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It ran longer than allowed and was killed.
    #[error("{program} was stopped after {deadline_s} s without a result")]
    Deadline {
        /// The program's name.
        program: String,
        /// The time it had, in seconds.
        deadline_s: u64,
    },
    /// It ended with a failure.
    #[error("{program} failed ({status}): {complaint}")]
    Failed {
        /// The program's name.
        program: String,
        /// How it ended.
        status: ExitStatus,
        /// The end of what it wrote to standard error, control characters removed.
        complaint: String,
    },
}

/// A program and its arguments, to run once.
#[derive(Debug)]
pub struct Run {
    program: String,
    arguments: Vec<OsString>,
    deadline: Duration,
    limits: Option<Limits>,
    directory: Option<std::path::PathBuf>,
    environment: Vec<(&'static str, OsString)>,
    merged: bool,
}

impl Run {
    /// A run of `program` that may take `deadline`.
    pub fn new(program: &str, deadline: Duration) -> Self {
        Run {
            program: program.into(),
            arguments: Vec::new(),
            deadline,
            limits: None,
            directory: None,
            environment: Vec::new(),
            merged: false,
        }
    }

    /// Adds one argument.
    #[must_use]
    pub fn arg(mut self, argument: impl Into<OsString>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<A: Into<OsString>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// Sets resource limits.
    #[must_use]
    pub fn limits(mut self, limits: Limits) -> Self {
        self.limits = Some(limits);
        self
    }

    /// Sets the working directory.
    #[must_use]
    pub fn directory(mut self, directory: &Path) -> Self {
        self.directory = Some(directory.into());
        self
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, name: &'static str, value: impl Into<OsString>) -> Self {
        self.environment.push((name, value.into()));
        self
    }

    /// Joins its standard error to its standard output, for a program that tells its progress there.
    #[must_use]
    pub fn merged(mut self) -> Self {
        self.merged = true;
        self
    }

    /// Runs it and returns its standard output, cut at 8 MiB.
    ///
    /// # Errors
    /// See [`RunError`]. A program past its deadline has been killed and reaped when this returns.
    pub fn output(self) -> Result<Vec<u8>, RunError> {
        self.output_seen(&mut |_| ())
    }

    /// As [`Run::output`]; also shows each piece of standard output as it comes.
    ///
    /// # Errors
    /// As for [`Run::output`].
    pub fn output_seen(self, seen: &mut dyn FnMut(&[u8])) -> Result<Vec<u8>, RunError> {
        let program = self.program.clone();
        let lost = |source| RunError::Wait {
            program: program.clone(),
            source,
        };
        let started = self.start();
        let (mut child, pipe) = started.map_err(|source| RunError::Start {
            program: program.clone(),
            source,
        })?;
        let complaint = child.stderr.take().map(collect);
        let followed = follow(&child, pipe, Instant::now() + self.deadline, seen);
        if !matches!(followed, Ok(Some(_))) {
            // It may have ended by itself meanwhile: either way it is reaped.
            let _ = child.kill();
        }
        let status = child.wait().map_err(lost)?;
        let complaint = complaint.and_then(|reader| reader.join().ok()).unwrap_or_default();
        let Some(output) = followed.map_err(lost)? else {
            return Err(RunError::Deadline {
                program,
                deadline_s: self.deadline.as_secs(),
            });
        };
        if !status.success() {
            let complaint = printable_end(if self.merged { &output } else { &complaint });
            return Err(RunError::Failed {
                program,
                status,
                complaint,
            });
        }
        Ok(output)
    }

    /// Starts it; what it says comes through the pipe.
    fn start(&self) -> io::Result<(Child, Option<File>)> {
        let mut command = self.command();
        if !self.merged {
            let mut child = command.spawn()?;
            let pipe = child.stdout.take().map(|pipe| File::from(OwnedFd::from(pipe)));
            return Ok((child, pipe));
        }
        let (reader, writer) = io::pipe()?;
        command.stdout(writer.try_clone()?).stderr(writer);
        // The command goes with this function, and with it our ends for writing: the pipe ends when the program does.
        Ok((command.spawn()?, Some(File::from(OwnedFd::from(reader)))))
    }

    fn command(&self) -> Command {
        // prlimit (util-linux) sets the limits before the program's first instruction; doing so here would need
        // unsafe code between fork and exec, and doing so after the start would be a race.
        let mut command = match self.limits {
            None => Command::new(&self.program),
            Some(limits) => {
                let mut command = Command::new("prlimit");
                command
                    .arg(format!("--as={}", limits.address_space_bytes))
                    .arg(format!("--cpu={}", limits.cpu_s))
                    .arg(format!("--fsize={}", limits.file_bytes))
                    .args(["--core=0", "--", &self.program]);
                command
            }
        };
        command.args(&self.arguments).env("LC_ALL", "C");
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        if let Some(directory) = &self.directory {
            command.current_dir(directory);
        }
        command
    }
}

/// Reads a pipe to its end on a thread, keeping the first 8 MiB.
fn collect(mut pipe: impl Read + Send + 'static) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut kept = Vec::new();
        // An error here is a broken pipe: what came until then is the output.
        let _ = pipe.by_ref().take(OUTPUT_BYTES_MAX).read_to_end(&mut kept);
        let _ = io::copy(&mut pipe, &mut io::sink());
        kept
    })
}

/// Reads standard output until the child has ended; `None` when the deadline came first.
fn follow(
    child: &Child,
    mut pipe: Option<File>,
    end: Instant,
    seen: &mut dyn FnMut(&[u8]),
) -> io::Result<Option<Vec<u8>>> {
    let pidfd = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    let mut output = Vec::new();
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let timeout = Timespec {
            tv_sec: left.as_secs() as i64,
            tv_nsec: i64::from(left.subsec_nanos()),
        };
        let mut polled = vec![PollFd::new(&pidfd, PollFlags::IN)];
        polled.extend(pipe.iter().map(|pipe| PollFd::new(pipe, PollFlags::IN)));
        let count = match poll(&mut polled, Some(&timeout)) {
            Err(rustix::io::Errno::INTR) => continue,
            count => count?,
        };
        if count == 0 {
            return Ok(None);
        }
        let ended = !polled[0].revents().is_empty();
        let readable = polled.get(1).is_some_and(|pipe| !pipe.revents().is_empty());
        if let Some(reader) = pipe.as_mut().filter(|_| readable) {
            let length = reader.read(&mut piece)?;
            seen(&piece[..length]);
            let room = (OUTPUT_BYTES_MAX as usize).saturating_sub(output.len());
            output.extend_from_slice(&piece[..length.min(room)]);
            if length == 0 {
                pipe = None;
            }
        } else if ended {
            // What it wrote before its end has been read; a child of its own that still holds the pipe is not waited for.
            return Ok(Some(output));
        }
    }
}

/// The end of a program's complaint on one line, without control characters.
fn printable_end(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let clean: Vec<char> = text
        .trim()
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    clean[clean.len().saturating_sub(COMPLAINT_CHARS_MAX)..]
        .iter()
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_past_its_deadline_is_killed() {
        let started = Instant::now();
        let result = Run::new("sleep", Duration::from_millis(200)).arg("60").output();
        assert!(matches!(result, Err(RunError::Deadline { .. })), "{result:?}");
        assert!(started.elapsed() < Duration::from_secs(30));
    }

    #[test]
    fn limits_reach_the_program_and_its_complaint_reaches_us() {
        let limits = Limits {
            address_space_bytes: 1 << 30,
            cpu_s: 7,
            file_bytes: 1 << 20,
        };
        let shown = Run::new("prlimit", Duration::from_secs(10))
            .arg("--cpu")
            .arg("--raw")
            .arg("--noheadings");
        let shown = String::from_utf8(shown.limits(limits).output().unwrap()).unwrap();
        assert!(shown.contains(" 7 7 "), "{shown}");
        let failed = Run::new("ls", Duration::from_secs(10)).arg("/does/not/exist").output();
        assert!(failed.unwrap_err().to_string().contains("/does/not/exist"));
    }

    #[test]
    fn a_merged_complaint_is_seen_as_it_comes_and_told_in_the_end() {
        let mut seen = Vec::new();
        let failed = Run::new("ls", Duration::from_secs(10))
            .arg("/does/not/exist")
            .env("LC_ALL", "C.UTF-8")
            .merged()
            .output_seen(&mut |piece| seen.extend_from_slice(piece));
        assert!(failed.unwrap_err().to_string().contains("/does/not/exist"));
        assert!(String::from_utf8(seen).unwrap().contains("/does/not/exist"));
    }
}
