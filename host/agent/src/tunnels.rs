//! A migration's tunnel as the agent sees it: a process of its own, watched by its status file and its end.

use std::{
    io::Write as _,
    net::SocketAddr,
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use driver::{INCOMING_SOCKET, OUTGOING_SOCKET, Process};
use model::Terms;
use qemu::Pinned;
use rustix::fs::inotify;
use sha2::{Digest as _, Sha256};
use task::{Input, TunnelEvent};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::mpsc,
};

use crate::{
    config::AgentConfig,
    runner::Fed,
    template::chain,
    tunnel::{self, Phase, Program, Running, Side, Token, TunnelSpec, TunnelStatus, VERSION},
};

/// The first authenticated connection must be there within this.
const CONNECT_MS_MAX: u64 = 30_000;
/// From then, the migration must begin within this.
const BEGIN_MS_MAX: u64 = 60_000;
/// A peer whose kernel acknowledges nothing for this long is dead.
const SILENCE_MS_MAX: u64 = 10_000;

/// A tunnel that is watched.
#[derive(Debug)]
pub(crate) struct Tunnel {
    /// Whether anybody still wants to hear of it. Its end is waited for in any case: a child that nobody waits for stays a zombie.
    heard: Arc<AtomicBool>,
    process: tunnel::Running,
    directory: PathBuf,
    /// By which the process sees that this agent lives.
    leash: Option<UnixStream>,
}

/// Where a VM's tunnel keeps its files.
fn directory(config: &AgentConfig, terms: &Terms) -> PathBuf {
    config.vm_run_dir(terms.vm).join("tunnel")
}

/// What both sides know of a migration and nobody who is not one of its hosts may use: the peers' certificates say who they are, this
/// says which of their migrations is meant.
fn token(terms: &Terms) -> Token {
    let mut hash = Sha256::new();
    hash.update(b"godwit migration tunnel 1");
    hash.update(terms.vm.0.as_bytes());
    hash.update(terms.operation.0.as_bytes());
    hash.update(terms.granted.0.to_le_bytes());
    Token::new(hash.finalize().into())
}

fn spec(config: &AgentConfig, terms: &Terms, peer: uuid::Uuid, side: Side) -> TunnelSpec {
    TunnelSpec {
        version: VERSION,
        directory: directory(config, terms),
        identity: config.identity_path(),
        peer,
        token: token(terms),
        side,
        connect_ms_max: CONNECT_MS_MAX,
        begin_ms_max: BEGIN_MS_MAX,
        silence_ms_max: SILENCE_MS_MAX,
    }
}

impl Tunnel {
    /// Destination: starts a tunnel that listens for the source.
    pub(crate) fn listen(
        program: &Program,
        config: &AgentConfig,
        terms: &Terms,
        fed: mpsc::Sender<Fed>,
    ) -> Result<Self, String> {
        let incoming = config.vm_run_dir(terms.vm).join(INCOMING_SOCKET);
        let side = Side::Destination {
            listen: SocketAddr::new(config.address, 0),
            incoming,
        };
        Self::start(program, &spec(config, terms, terms.source.0, side), fed)
    }

    /// Source: starts a tunnel that connects to the destination's.
    pub(crate) fn dial(
        program: &Program,
        config: &AgentConfig,
        terms: &Terms,
        peer_address: SocketAddr,
        fed: mpsc::Sender<Fed>,
    ) -> Result<Self, String> {
        let listen = config.vm_run_dir(terms.vm).join(OUTGOING_SOCKET);
        let side = Side::Source {
            listen,
            peer_address,
            leash: true,
        };
        Self::start(program, &spec(config, terms, terms.destination.0, side), fed)
    }

    fn start(program: &Program, spec: &TunnelSpec, fed: mpsc::Sender<Fed>) -> Result<Self, String> {
        let process = tunnel::spawn(spec, &program.path()).map_err(|error| chain(&error))?;
        qemu::own_scope(process.process(), "tunnel".to_owned());
        Self::kept(&spec.directory, process, fed)
    }

    /// Watches a new tunnel and writes down which process it is.
    fn kept(directory: &Path, process: Running, fed: mpsc::Sender<Fed>) -> Result<Self, String> {
        // Watched before anything can fail: whoever watches also takes its zombie away.
        let watched = Self::watch(directory.to_owned(), process.clone(), fed);
        let kept = watched.and_then(|tunnel| keep(directory, process.process()).map(|()| tunnel));
        // Without its record no later agent would find it: it must not stay.
        kept.inspect_err(|_| end(&process))
    }

    /// Finds a tunnel again after the agent was restarted.
    pub(crate) fn adopt(config: &AgentConfig, terms: &Terms, fed: mpsc::Sender<Fed>) -> Result<Self, String> {
        let directory = directory(config, terms);
        let record = std::fs::read_to_string(directory.join("process")).map_err(|error| error.to_string())?;
        let numbers = record.split_once(' ').and_then(|(pid, start)| {
            let (pid, start_ticks) = (pid.parse().ok()?, start.parse().ok()?);
            Some(Process { pid, start_ticks })
        });
        let process = tunnel::adopt(numbers.ok_or("its record is damaged")?).map_err(|error| chain(&error))?;
        Self::watch(directory, process, fed)
    }

    fn watch(directory: PathBuf, process: Running, fed: mpsc::Sender<Fed>) -> Result<Self, String> {
        let changes = changes_of(&directory).map_err(|error| error.to_string())?;
        let heard = Arc::new(AtomicBool::new(true));
        let told = Told {
            fed,
            heard: Arc::clone(&heard),
        };
        let (followed, followed_in) = (process.pinned().clone(), directory.clone());
        tokio::spawn(async move { follow(&followed_in, followed, changes, told).await });
        Ok(Self {
            heard,
            process,
            directory,
            leash: None,
        })
    }

    /// Source: says whether the stream may flow.
    pub(crate) fn say(&mut self, word: tunnel::Word) {
        if let Err(error) = self.try_say(word) {
            // A process of an earlier version has no leash, and flows; of one that is dead its watcher tells.
            tracing::warn!(?word, %error, "the tunnel was not told whether it may flow");
            self.leash = None;
        }
    }

    fn try_say(&mut self, word: tunnel::Word) -> std::io::Result<()> {
        let leash = match self.leash.take() {
            Some(leash) => leash,
            None => {
                let leash = UnixStream::connect(self.directory.join("leash"))?;
                leash.set_nonblocking(true)?;
                leash
            }
        };
        self.leash.insert(leash).write_all(&[word as u8])
    }

    /// Ends it, at once; whoever watches still hears how it stood.
    pub(crate) fn close(&self) {
        end(&self.process);
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        self.heard.store(false, Ordering::Release);
    }
}

/// Who hears of a tunnel.
struct Told {
    fed: mpsc::Sender<Fed>,
    heard: Arc<AtomicBool>,
}

impl Told {
    /// Tells, unless nobody wants to hear it any more: the next migration must not take it for its own.
    async fn tell(&self, event: TunnelEvent) {
        if self.heard.load(Ordering::Acquire) {
            // A runner that has ended wants to hear nothing.
            let _ = self.fed.send(Fed::Input(Input::Tunnel(event))).await;
        }
    }
}

/// Writes down which process a tunnel is, for the agent after this one.
fn keep(directory: &Path, process: Process) -> Result<(), String> {
    let record = format!("{} {}", process.pid, process.start_ticks);
    std::fs::write(directory.join("process"), record).map_err(|error| format!("its record was not written: {error}"))
}

fn end(process: &Running) {
    if let Err(error) = process.kill() {
        tracing::warn!(error = &error as &dyn std::error::Error, "a tunnel was not ended");
    }
}

fn changes_of(directory: &Path) -> std::io::Result<AsyncFd<OwnedFd>> {
    let changes = inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC)?;
    inotify::add_watch(&changes, directory, inotify::WatchFlags::MOVED_TO)?;
    watched(changes, Interest::READABLE)
}

/// A descriptor whose readiness the runtime tells.
#[allow(unsafe_code)]
pub(crate) fn watched(fd: OwnedFd, interest: Interest) -> std::io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the descriptor is owned by the `AsyncFd`, so it stays open and the same for as long as it is registered.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(Into::into)
}

/// Tells each new phase once, until the process ends.
async fn follow(directory: &Path, process: Pinned, changes: AsyncFd<OwnedFd>, told_to: Told) {
    let Ok(end) = process.watch() else {
        return;
    };
    let mut told: Option<Phase> = None;
    loop {
        let ended = tokio::select! {
            biased;
            _ = end.readable() => true,
            ready = drained(&changes), if told.is_some() => { if ready.is_err() { return } false }
            // The first look comes after the watch was set, so that no change is missed.
            () = std::future::ready(()), if told.is_none() => {
                told = Some(Phase::Listening);
                false
            }
        };
        let status = TunnelStatus::read(&directory.join("status.json")).ok();
        if let Some(status) = &status
            && let Some(event) = event_of(status, told)
        {
            told = Some(status.phase);
            told_to.tell(event).await;
        }
        if ended {
            // A child of ours would stay a zombie.
            process.reap();
            told_to.tell(last_event(status.as_ref())).await;
            return;
        }
    }
}

async fn drained(changes: &AsyncFd<OwnedFd>) -> std::io::Result<()> {
    let mut ready = changes.readable().await?;
    let mut buffer = [0; 4096];
    while let Ok(1..) = rustix::io::read(changes.get_ref(), &mut buffer) {}
    ready.clear_ready();
    Ok(())
}

fn event_of(status: &TunnelStatus, told: Option<Phase>) -> Option<TunnelEvent> {
    match (status.phase, status.port) {
        (Phase::Listening, Some(port)) => Some(TunnelEvent::Listening { port }),
        (Phase::Connected, _) if told != Some(Phase::Connected) => Some(TunnelEvent::Connected),
        // The end of the process tells the rest.
        _ => None,
    }
}

fn last_event(status: Option<&TunnelStatus>) -> TunnelEvent {
    match status {
        Some(status) if status.phase != Phase::Failed && status.channels_total > 0 => TunnelEvent::Closed {
            wire_bytes: status.sent_bytes + status.received_bytes,
        },
        Some(TunnelStatus { error: Some(why), .. }) => TunnelEvent::Failed { reason: why.clone() },
        _ => TunnelEvent::Failed {
            reason: "it ended before the migration began".to_owned(),
        },
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test ends where its promise is broken")]

    use std::process::Command;

    use super::*;

    #[tokio::test]
    async fn a_tunnel_whose_record_cannot_be_written_is_ended_and_leaves_no_zombie() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("process")).unwrap();
        let child = Command::new("sleep").arg("1000").spawn().unwrap();
        let process = Running::of(Pinned::child(child).unwrap());
        let (fed, mut told) = mpsc::channel(8);
        let result = Tunnel::kept(dir.path(), process.clone(), fed);
        assert!(result.unwrap_err().contains("its record was not written"));
        // It was dropped, so nobody is told; the end of whoever watches is the end of the channel.
        let ended = tokio::time::timeout(std::time::Duration::from_secs(10), told.recv()).await;
        assert!(ended.expect("it was ended").is_none());
        assert!(!Path::new(&format!("/proc/{}", process.process().pid)).exists());
    }
}
