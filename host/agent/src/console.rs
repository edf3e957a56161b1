//! Serial consoles: what a guest prints is kept, bounded, and shown to those who look; what they type goes to the guest.
//!
//! ```text
//!   QEMU's serial socket ──▶ Serial ──▶ log file (two halves of 512 KiB)
//!                             │  ▲
//!                    everyone ▼  │ who looks          one HTTP/2 request and response each, to the controller
//! ```

use std::{
    fs::{self, File},
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::{Request, StatusCode};
use model::{Code, Refusal, VmId};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    sync::{broadcast, mpsc},
    task::JoinHandle,
    time::{Instant, timeout},
};
use uuid::Uuid;
use wire::{
    Ticket,
    session::{CONSOLE_PATH, TICKET_HEADER},
};

use crate::{session, shared::Shared};

/// Each of the two halves of a log.
const LOG_HALF_BYTES: u64 = 512 << 10;
/// Pieces of output that somebody who looks may lag behind.
const LAG_MAX: usize = 256;
/// Between two tries to keep a log where that failed.
const LOG_AGAIN: Duration = Duration::from_secs(60);
/// What somebody typed and the guest has not taken.
const TYPED_WAITING_MAX: usize = 64;

/// A guest's serial console.
#[derive(Debug)]
pub(crate) struct Serial {
    output: broadcast::Sender<Bytes>,
    input: mpsc::Sender<Bytes>,
    pump: JoinHandle<()>,
}

impl Serial {
    /// Begins to read the socket and to keep a log in `log_dir`.
    pub(crate) fn open(socket: PathBuf, log_dir: PathBuf) -> Self {
        let (output, _) = broadcast::channel(LAG_MAX);
        let (input, typed) = mpsc::channel(TYPED_WAITING_MAX);
        let everyone = output.clone();
        let pump = tokio::spawn(async move {
            if let Err(error) = pump(&socket, log_dir, everyone, typed).await {
                tracing::debug!(socket = %socket.display(), %error, "the serial console ended");
            }
        });
        Self { output, input, pump }
    }

    /// What the guest prints from now on, and where to type.
    pub(crate) fn look(&self) -> (broadcast::Receiver<Bytes>, mpsc::Sender<Bytes>) {
        (self.output.subscribe(), self.input.clone())
    }
}

impl Drop for Serial {
    fn drop(&mut self) {
        self.pump.abort();
    }
}

async fn pump(
    socket: &std::path::Path,
    log_dir: PathBuf,
    everyone: broadcast::Sender<Bytes>,
    mut typed: mpsc::Receiver<Bytes>,
) -> std::io::Result<()> {
    let mut log = Kept::open(log_dir);
    let (mut from, mut to) = UnixStream::connect(socket).await?.into_split();
    let mut buffer = vec![0; 16 << 10];
    // What was typed and not taken yet.
    let mut waiting = Bytes::new();
    loop {
        // Written beside the reading: a guest that does not read what was typed must not be stopped in what it prints.
        tokio::select! {
            read = from.read(&mut buffer) => {
                let n = read?;
                if n == 0 {
                    return Ok(());
                }
                log.write(&buffer[..n]);
                // Nobody looking is fine.
                let _ = everyone.send(Bytes::copy_from_slice(&buffer[..n]));
            }
            wrote = to.write(&waiting), if !waiting.is_empty() => drop(waiting.split_to(wrote?)),
            Some(bytes) = typed.recv(), if waiting.is_empty() => waiting = bytes,
        }
    }
}

/// A log, where one can be kept: a console goes on without it.
struct Kept {
    dir: PathBuf,
    log: Option<Log>,
    /// When it is tried again.
    again: Instant,
}

impl Kept {
    fn open(dir: PathBuf) -> Self {
        let log = None;
        let again = Instant::now();
        Self { dir, log, again }
    }

    fn write(&mut self, bytes: &[u8]) {
        if self.log.is_none() && Instant::now() < self.again {
            return;
        }
        let written = match &mut self.log {
            Some(log) => log.write(bytes),
            None => Log::open(self.dir.clone()).and_then(|log| self.log.insert(log).write(bytes)),
        };
        if let Err(error) = written {
            tracing::warn!(log = %self.dir.display(), %error, "what the guest prints is not kept; tried again later");
            self.log = None;
            self.again = Instant::now() + LOG_AGAIN;
        }
    }
}

/// A log in two files, of which the older is dropped when the newer is full.
struct Log {
    dir: PathBuf,
    file: File,
    bytes: u64,
}

impl Log {
    fn open(dir: PathBuf) -> std::io::Result<Self> {
        fs::create_dir_all(&dir)?;
        let file = File::options()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(dir.join("serial.log"))?;
        let bytes = file.metadata()?.len();
        Ok(Self { dir, file, bytes })
    }

    fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        if self.bytes + bytes.len() as u64 > LOG_HALF_BYTES {
            fs::rename(self.dir.join("serial.log"), self.dir.join("serial.log.1"))?;
            *self = Self::open(self.dir.clone())?;
        }
        self.file.write_all(bytes)?;
        self.bytes += bytes.len() as u64;
        Ok(())
    }
}

/// Connects a VM's console to somebody who looks by way of the controller; returns when either ends.
pub(crate) async fn serve(shared: &Arc<Shared>, console: Uuid, vm: VmId, ticket: &Ticket) -> Result<(), Refusal> {
    let gone = |text: String| Refusal::new(Code::WrongState, text);
    let (mut output, input) = shared
        .look_at(vm)
        .await
        .ok_or_else(|| gone(format!("VM {vm} has no console on this host: it is off or has moved")))?;
    let mut link = shared
        .link()
        .ok_or_else(|| gone("the controller is not connected".to_owned()))?;
    let (show, shown) = mpsc::channel(LAG_MAX);
    let forward = tokio::spawn(async move {
        loop {
            match output.recv().await {
                Ok(bytes) => {
                    if show.send(bytes).await.is_err() {
                        return;
                    }
                }
                // Who looks too slowly misses some; the guest is not held up.
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => return,
            }
        }
    });
    let _stop = StopOnDrop(forward);
    let failed = |error: &dyn std::fmt::Display| {
        Refusal::new(Code::HostFailed, format!("the console of VM {vm} broke: {error}"))
    };
    let request = Request::post(format!("{CONSOLE_PATH}/{console}"))
        .header(TICKET_HEADER, ticket.expose())
        .body(session::body_of(shown))
        .map_err(|error| failed(&error))?;
    let answer = timeout(session::CONNECT_MAX, link.send_request(request)).await;
    let answer = answer
        .map_err(|_| failed(&"the controller does not answer"))?
        .map_err(|error| failed(&error))?;
    if answer.status() != StatusCode::OK {
        return Err(failed(&answer.status()));
    }
    let mut typed = answer.into_body();
    while let Some(frame) = typed.frame().await {
        let frame = frame.map_err(|error| failed(&error))?;
        if let Ok(bytes) = frame.into_data()
            && input.send(bytes).await.is_err()
        {
            break;
        }
    }
    Ok(())
}

struct StopOnDrop(JoinHandle<()>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_output_keeps_the_log_bounded_and_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = Log::open(dir.path().to_owned()).unwrap();
        for n in 0..200_000 {
            log.write(format!("line {n:>10}\n").as_bytes()).unwrap();
        }
        let total: u64 = fs::read_dir(dir.path())
            .unwrap()
            .map(|e| e.unwrap().metadata().unwrap().len())
            .sum();
        assert!(total <= 2 * LOG_HALF_BYTES);
        let text = fs::read_to_string(dir.path().join("serial.log")).unwrap();
        assert!(text.ends_with("line     199999\n"));
    }

    #[tokio::test]
    async fn what_the_guest_prints_reaches_who_looks_and_what_they_type_reaches_the_guest() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("serial.sock");
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        let serial = Serial::open(path, dir.path().join("log"));
        let (mut output, input) = serial.look();
        let (mut guest, _) = listener.accept().await.unwrap();
        guest.write_all(b"login: ").await.unwrap();
        assert_eq!(&output.recv().await.unwrap()[..], b"login: ");
        input.send(Bytes::from_static(b"root\n")).await.unwrap();
        let mut typed = [0; 5];
        guest.read_exact(&mut typed).await.unwrap();
        assert_eq!(&typed, b"root\n");
    }

    #[tokio::test]
    async fn a_guest_that_does_not_read_what_was_typed_is_not_stopped_in_what_it_prints() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("serial.sock");
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        let serial = Serial::open(path, dir.path().join("log"));
        let (mut output, input) = serial.look();
        let (mut guest, _) = listener.accept().await.unwrap();
        // More than a socket holds: at the end nothing more is taken.
        let paste = Bytes::from(vec![b'x'; 64 << 10]);
        let full = async { while input.send(paste.clone()).await.is_ok() {} };
        timeout(Duration::from_secs(1), full).await.unwrap_err();
        guest.write_all(b"still here").await.unwrap();
        let printed = timeout(Duration::from_secs(10), output.recv()).await.unwrap().unwrap();
        assert_eq!(&printed[..], b"still here");
        // And it gets all of it once it reads.
        let mut typed = vec![0; 64 << 10];
        for _ in 0..4 {
            guest.read_exact(&mut typed).await.unwrap();
            assert_eq!(typed, paste);
        }
    }

    #[tokio::test]
    async fn a_console_goes_on_though_its_log_cannot_be_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("serial.sock");
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        // A file is in the place of its directory.
        std::fs::write(dir.path().join("log"), "").unwrap();
        let serial = Serial::open(path, dir.path().join("log"));
        let (mut output, _input) = serial.look();
        let (mut guest, _) = listener.accept().await.unwrap();
        for printed in [&b"one"[..], b"two"] {
            guest.write_all(printed).await.unwrap();
            assert_eq!(&output.recv().await.unwrap()[..], printed);
        }
    }

    #[test]
    fn a_log_that_could_not_be_kept_is_kept_again_later() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("log");
        std::fs::write(&place, "").unwrap();
        let mut kept = Kept::open(place.clone());
        kept.write(b"lost");
        std::fs::remove_file(&place).unwrap();
        kept.write(b"lost too");
        kept.again = Instant::now();
        kept.write(b"kept");
        assert_eq!(std::fs::read(place.join("serial.log")).unwrap(), b"kept");
    }
}
