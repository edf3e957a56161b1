//! The program `nft`: rules go to it as text on its standard input, in one transaction; what the kernel holds comes back as JSON.
//!
//! Several at once are fine: the kernel takes one transaction after the other, and `nft` tries again where another came between.

use std::{
    io::{self, Read, Write},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{PidfdFlags, pidfd_open},
};
use serde_json::Value;

/// How long it may take: a transaction takes milliseconds, on a busy machine with thousands of ports some seconds.
const ANSWER_MAX: Duration = Duration::from_secs(20);
/// Most bytes that are taken from it.
const ANSWER_BYTES_MAX: u64 = 64 << 20;
/// Where it lies when the search path does not say.
const PLACES: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/local/sbin", "/usr/bin"];

/// Why rules were not set or read.
#[derive(Debug, thiserror::Error)]
pub enum NftError {
    /// It is not installed.
    #[error("the program nft is not installed; install the package nftables")]
    Missing,
    /// It could not be run.
    #[error("nft could not be run")]
    Run(#[source] io::Error),
    /// It did not come to an end.
    #[error("nft did not end within {} s", ANSWER_MAX.as_secs())]
    Slow,
    /// The kernel or the program refused.
    #[error("nft refused: {0}")]
    Refused(String),
    /// What it printed could not be read.
    #[error("nft printed what is no JSON")]
    Answer(#[source] serde_json::Error),
}

/// The program.
#[derive(Clone, Debug)]
pub(crate) struct Nft(Option<PathBuf>);

impl Nft {
    /// Looks for it.
    pub(crate) fn find() -> Self {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let places = std::env::split_paths(&path).chain(PLACES.map(PathBuf::from));
        Self(places.map(|place| place.join("nft")).find(|program| program.is_file()))
    }

    /// Has these commands carried out: all or none. In the calling thread's network namespace.
    pub(crate) fn apply(&self, commands: &str) -> Result<(), NftError> {
        self.run(&["-f", "-"], commands.as_bytes()).map(drop)
    }

    /// What `nft -j list ...` says: the objects of its list.
    pub(crate) fn list(&self, what: &[&str]) -> Result<Vec<Value>, NftError> {
        let arguments = [&["-j", "-n", "list"], what].concat();
        let printed = self.run(&arguments, &[])?;
        let mut answer: Value = serde_json::from_slice(&printed).map_err(NftError::Answer)?;
        match answer.get_mut("nftables").map(Value::take) {
            Some(Value::Array(objects)) => Ok(objects),
            _ => Ok(vec![]),
        }
    }

    fn run(&self, arguments: &[&str], input: &[u8]) -> Result<Vec<u8>, NftError> {
        let program: &Path = self.0.as_deref().ok_or(NftError::Missing)?;
        let mut child = Command::new(program)
            .args(arguments)
            .env_clear()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(NftError::Run)?;
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (ended, printed, said) = thread::scope(|scope| {
            let printed = scope.spawn(|| all(stdout));
            let said = scope.spawn(|| all(stderr));
            scope.spawn(move || {
                // One that refuses early reads no further: what it says then tells why.
                let _ = stdin.map(|mut stdin| stdin.write_all(input));
            });
            let ended = end(&mut child);
            (ended, printed.join(), said.join())
        });
        let (printed, said) = (printed.unwrap_or_default(), said.unwrap_or_default());
        if ended? {
            return Ok(printed);
        }
        let said = String::from_utf8_lossy(&said);
        let lines = said.lines().map(str::trim).filter(|line| line.contains("rror")).take(3);
        Err(NftError::Refused(lines.collect::<Vec<_>>().join("; ")))
    }
}

fn all(from: Option<impl Read>) -> Vec<u8> {
    let mut bytes = vec![];
    // What cannot be read is missing from the answer, which is then no JSON.
    let _ = from.map(|from| from.take(ANSWER_BYTES_MAX).read_to_end(&mut bytes));
    bytes
}

/// Waits for its end; whether it was a good one.
fn end(child: &mut Child) -> Result<bool, NftError> {
    let ended = wait(child);
    if !matches!(ended, Ok(true)) {
        // Without its end its pipes stay open, and so would this call. It may have ended just now.
        let _ = child.kill();
    }
    let status = child.wait().map_err(NftError::Run)?;
    match ended {
        Ok(true) => Ok(status.success()),
        Ok(false) => Err(NftError::Slow),
        Err(error) => Err(NftError::Run(error)),
    }
}

fn wait(child: &Child) -> io::Result<bool> {
    let pid = i32::try_from(child.id()).ok().and_then(rustix::process::Pid::from_raw);
    let pid = pid.ok_or_else(|| io::Error::other("a process has no id"))?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    let allowed = Timespec {
        tv_sec: ANSWER_MAX.as_secs().try_into().unwrap_or(i64::MAX),
        tv_nsec: 0,
    };
    let mut watched = [PollFd::new(&pidfd, PollFlags::IN)];
    let ready = rustix::io::retry_on_intr(|| poll(&mut watched, Some(&allowed)))?;
    Ok(ready > 0)
}
