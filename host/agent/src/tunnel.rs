//! The migration tunnel: guest memory and state between two QEMUs, encrypted, between exactly two hosts.
//!
//! ```text
//!   host A                                                        host B
//!   QEMU --unix--> godwit tunnel (source) ==TLS 1.3, mutual==> godwit tunnel (destination) --unix--> QEMU -incoming
//!                   one process per migration and side: the agents may be killed or upgraded meanwhile
//! ```
//! Invariants
//! - QEMU sees a connection only after the peer has proved to be the expected host (certificate) and of this migration
//!   (token), and the peer's QEMU is there. A stranger gets nothing and holds nothing that the right peer needs.
//! - Bytes and ends of stream pass in both directions exactly; a stream that was cut is never given out as one that ended.
//! - At most [`CHANNELS_MAX`] connections of QEMU, kept in their order.
//! - A source's stream flows only while its agent lets it, or once that has said that it may flow to its end (`leash`).
//! - The process can be killed at any time: the kernel closes its sockets, and both QEMUs see the end of their stream.
//!
//! Threads with poll, one for each connection: see the numbers in `relay`.

mod leash;
mod link;
mod process;
mod relay;
mod spec;
mod status;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::io;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use identity::tls::TlsError;
use identity::{NodeError, NodeIdentity};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::net::sockopt;
use rustls::{ClientConfig, ClientConnection, Connection, ServerConfig, ServerConnection};

pub use leash::Word;
pub use link::LinkError;
pub use process::{ProcessError, Program, Running, adopt, spawn};
pub use relay::RelayError;
pub use spec::{Side, SpecError, Token, TunnelSpec, VERSION};
pub use status::{Phase, TunnelStatus};

use leash::{Gate, Leash};
use link::Link;
use relay::{Traffic, relay};
use status::StatusFile;

/// QEMU's connections at once: main, multifd and post-copy preempt channels.
pub const CHANNELS_MAX: u32 = 16;
/// Connections that have not proved themselves; when there are more, the oldest is closed.
const STRANGERS_MAX: usize = 64;
/// Threads for connections at once; beyond it new ones wait in the kernel's (bounded) queue.
const VISITS_MAX: usize = 2 * STRANGERS_MAX + CHANNELS_MAX as usize;
/// Time for a connection to prove itself, and for QEMU to accept.
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);
/// How often the byte counts are written.
const STATUS_EVERY: Duration = Duration::from_millis(100);
/// Lines in the log, at most.
const LOG_LINES_MAX: u64 = 500;
const THREAD_STACK_BYTES: usize = 1024 * 1024;
/// What waits in a buffer when the guest stops is part of its standstill: the other QEMU has to take it in first.
const LOCAL_BUFFER_BYTES: usize = 256 * 1024;

/// Why a tunnel ended otherwise than by the end of the migration's stream.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    /// Its specification is of no use.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// This host's identity is of no use.
    #[error(transparent)]
    Identity(#[from] NodeError),
    /// TLS cannot be set up.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// It cannot listen.
    #[error("cannot listen on {at}")]
    Listen {
        /// Address or path.
        at: String,
        /// What the system said.
        source: io::Error,
    },
    /// The status file cannot be written, or the kernel refused something that never fails.
    #[error("the tunnel cannot go on")]
    System(#[from] io::Error),
    /// The other host could not be reached.
    #[error("cannot reach the other host's tunnel")]
    Dial(#[source] LinkError),
    /// The other host did not connect.
    #[error("the other host did not connect in time")]
    NobodyCame,
    /// QEMU did not connect.
    #[error("the migration did not begin in time")]
    NotBegun,
    /// The other host left before the migration began.
    #[error("the other host's tunnel left before the migration began")]
    Left,
    /// A connection failed while guest bytes flowed.
    #[error(transparent)]
    Relay(#[from] RelayError),
}

/// The tunnel process: reads the spec and relays until both directions of all connections have ended. Everything that
/// it says is in the status file and, for people, on standard error.
pub fn main(spec: &Path) -> Result<(), TunnelError> {
    // Own session: a signal to the agent's group or its terminal does not reach us. It fails only where we lead one.
    let _ = rustix::process::setsid();
    run(&TunnelSpec::read(spec)?)
}

/// [`main`] for a spec at hand.
pub fn run(spec: &TunnelSpec) -> Result<(), TunnelError> {
    let tunnel = Arc::new(Tunnel::new(spec.clone())?);
    let identity = NodeIdentity::load(&spec.identity)?;
    let mut file = StatusFile::new(spec.status_path());
    let outcome = match &spec.side {
        Side::Source {
            listen,
            peer_address,
            leash,
        } => {
            let config = Arc::new(identity::tls::to_host(&identity, spec.peer)?);
            let local = bind_local(listen)?;
            let leash = leash.then(|| Leash::bind(&spec.leash_path())).transpose()?;
            Source {
                tunnel: &tunnel,
                config,
                peer: *peer_address,
                local,
                leash,
                ready: None,
            }
            .serve(&mut file)
        }
        Side::Destination { listen, incoming } => {
            let config = Arc::new(identity::tls::from_host(&identity, spec.peer)?);
            let failed = |source| TunnelError::Listen {
                at: listen.to_string(),
                source,
            };
            let listener = TcpListener::bind(listen).map_err(failed)?;
            tunnel.facts().port = Some(listener.local_addr().map_err(failed)?.port());
            Destination {
                tunnel: &tunnel,
                config,
                listener,
                incoming,
            }
            .serve(&mut file)
        }
    };
    let error = outcome.as_ref().err().map(|error| model::story(error));
    if let Some(error) = &error {
        tunnel.log(error);
    }
    let mut status = tunnel.status(if error.is_some() { Phase::Failed } else { Phase::Closed });
    status.error = error;
    file.write(&status)?;
    outcome
}

/// What the threads of one tunnel share.
struct Tunnel {
    spec: TunnelSpec,
    traffic: Traffic,
    gate: Gate,
    /// Authenticated connections now; never more than [`CHANNELS_MAX`].
    slots: AtomicU32,
    refused: AtomicU64,
    log_lines: AtomicU64,
    facts: Mutex<Facts>,
    /// Readable when a fact has changed.
    wake: OwnedFd,
}

#[derive(Default)]
struct Facts {
    port: Option<u16>,
    /// When the first connection was authenticated.
    connected: Option<Instant>,
    channels_open: u32,
    channels_total: u32,
    failure: Option<TunnelError>,
    /// Threads that serve connections now.
    visits: usize,
    /// Connections that have not proved themselves, oldest first.
    strangers: VecDeque<(u64, TcpStream)>,
}

impl Tunnel {
    fn new(spec: TunnelSpec) -> io::Result<Self> {
        Ok(Self {
            gate: Gate::new(!matches!(spec.side, Side::Source { leash: true, .. }))?,
            spec,
            traffic: Traffic::default(),
            slots: AtomicU32::new(0),
            refused: AtomicU64::new(0),
            log_lines: AtomicU64::new(0),
            facts: Mutex::default(),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    fn facts(&self) -> MutexGuard<'_, Facts> {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, how: impl FnOnce(&mut Facts)) {
        how(&mut self.facts());
        // Fails only when the counter is full; then it is readable anyway.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    fn log(&self, line: &str) {
        if self.log_lines.fetch_add(1, Ordering::Relaxed) < LOG_LINES_MAX {
            eprintln!("{line}");
        }
    }

    fn refuse(&self, why: &dyn std::error::Error) {
        self.refused.fetch_add(1, Ordering::Relaxed);
        self.log(&format!("refused a connection: {}", model::story(why)));
    }

    fn take_slot(&self) -> bool {
        let free = |taken| (taken < CHANNELS_MAX).then_some(taken + 1);
        self.slots
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, free)
            .is_ok()
    }

    fn status(&self, phase: Phase) -> TunnelStatus {
        let facts = self.facts();
        TunnelStatus {
            version: VERSION,
            phase,
            port: facts.port,
            channels_open: facts.channels_open,
            channels_total: facts.channels_total,
            sent_bytes: self.traffic.sent.load(Ordering::Relaxed),
            received_bytes: self.traffic.received.load(Ordering::Relaxed),
            refused: self.refused.load(Ordering::Relaxed),
            error: None,
        }
    }

    /// Relays one of QEMU's connections to its end.
    fn relay(&self, link: Link, local: UnixStream) {
        // Only a size hint; the default works too.
        let _ = sockopt::set_socket_send_buffer_size_force(&local, LOCAL_BUFFER_BYTES)
            .or_else(|_| sockopt::set_socket_send_buffer_size(&local, LOCAL_BUFFER_BYTES));
        let outcome = relay(link.net, link.tls, local, &self.traffic, &self.gate);
        self.change(|facts| {
            facts.channels_open -= 1;
            if let Err(error) = outcome {
                facts.failure.get_or_insert(error.into());
            }
        });
    }

    fn opened(&self) {
        self.change(|facts| {
            facts.channels_open += 1;
            facts.channels_total += 1;
        });
    }

    /// Waits for a fact, a connection or the time to write the status; then says whether the tunnel is at its end.
    fn turn(&self, watch: &[PollFd<'_>], file: &mut StatusFile, began: Instant) -> Result<Turn, TunnelError> {
        let phase = {
            let mut facts = self.facts();
            let unopened = self.slots.load(Ordering::Relaxed) > facts.channels_open;
            let over = match (facts.connected, facts.channels_total) {
                (_, 1..) => facts.channels_open == 0,
                (None, 0) if began.elapsed() >= self.spec.connect_max() => return Err(TunnelError::NobodyCame),
                (Some(_), 0) if !unopened => return Err(facts.failure.take().unwrap_or(TunnelError::Left)),
                (Some(at), 0) if at.elapsed() >= self.spec.begin_max() => return Err(TunnelError::NotBegun),
                _ => false,
            };
            if over {
                return facts.failure.take().map_or(Ok(Turn::Over), Err);
            }
            match (facts.connected, facts.channels_total) {
                (_, 1..) => Phase::Relaying,
                (Some(_), 0) => Phase::Connected,
                (None, 0) => Phase::Listening,
            }
        };
        file.write(&self.status(phase))?;
        let mut slots = vec![PollFd::from_borrowed_fd(self.wake.as_fd(), PollFlags::IN)];
        slots.extend_from_slice(watch);
        let patience = Timespec::try_from(STATUS_EVERY).map_err(io::Error::other)?;
        match poll(&mut slots, Some(&patience)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(io::Error::from(error).into()),
        }
        let _ = rustix::io::read(&self.wake, &mut [0u8; 8]);
        Ok(Turn::Ready(
            slots[1..].iter().map(|slot| !slot.revents().is_empty()).collect(),
        ))
    }
}

enum Turn {
    /// Which of the watched descriptors have something.
    Ready(Vec<bool>),
    Over,
}

/// A and its QEMU.
struct Source<'a> {
    tunnel: &'a Arc<Tunnel>,
    config: Arc<ClientConfig>,
    peer: std::net::SocketAddr,
    local: UnixListener,
    leash: Option<Leash>,
    /// The first connection, made before the migration begins.
    ready: Option<Link>,
}

impl Source<'_> {
    fn serve(mut self, file: &mut StatusFile) -> Result<(), TunnelError> {
        let began = Instant::now();
        let deadline = began + self.tunnel.spec.connect_max();
        self.ready = Some(self.dial(deadline).map_err(TunnelError::Dial)?);
        self.tunnel.slots.fetch_add(1, Ordering::Relaxed);
        self.tunnel.change(|facts| facts.connected = Some(Instant::now()));
        loop {
            let mut watch = vec![PollFd::new(&self.local, PollFlags::IN)];
            if let Some(link) = &self.ready {
                watch.push(PollFd::new(&link.net, PollFlags::IN));
            }
            if let Some(leash) = &self.leash {
                leash.watch(&mut watch);
            }
            let ready = match self.tunnel.turn(&watch, file, began)? {
                Turn::Over => return Ok(()),
                Turn::Ready(ready) => ready,
            };
            if let Some(leash) = &mut self.leash {
                leash.heed(&self.tunnel.gate);
            }
            if self.ready.is_some() && ready.get(1) == Some(&true) {
                // The destination has nothing to say before the opening, so this is its end.
                return Err(TunnelError::Left);
            }
            if ready.first() == Some(&true) {
                self.accept()?;
            }
        }
    }

    fn accept(&mut self) -> Result<(), TunnelError> {
        let (local, _) = match self.local.accept() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            outcome => outcome?,
        };
        let deadline = Instant::now() + HANDSHAKE_MAX;
        let link = match self.ready.take() {
            Some(link) => Ok(link),
            None if !self.tunnel.take_slot() => {
                self.tunnel.refuse(&TooMany);
                return Ok(());
            }
            None => self.dial(deadline),
        };
        // One after the other, so that QEMU there meets the channels in the order in which QEMU here made them.
        let link = link
            .and_then(|mut link| link.open(deadline).map(|()| link))
            .map_err(TunnelError::Dial)?;
        self.tunnel.opened();
        let tunnel = self.tunnel.clone();
        start(move || {
            tunnel.relay(link, local);
            tunnel.slots.fetch_sub(1, Ordering::Relaxed);
        })?;
        Ok(())
    }

    fn dial(&self, deadline: Instant) -> Result<Link, LinkError> {
        let left = deadline
            .saturating_duration_since(Instant::now())
            .max(Duration::from_millis(1));
        let net = TcpStream::connect_timeout(&self.peer, left)?;
        let tls = ClientConnection::new(self.config.clone(), identity::tls::unnamed())?;
        let mut link = Link::new(net, Connection::Client(tls), self.tunnel.spec.silence_max())?;
        link.introduce(&self.tunnel.spec.token, deadline)?;
        Ok(link)
    }
}

/// B and its QEMU.
struct Destination<'a> {
    tunnel: &'a Arc<Tunnel>,
    config: Arc<ServerConfig>,
    listener: TcpListener,
    incoming: &'a Path,
}

impl Destination<'_> {
    fn serve(self, file: &mut StatusFile) -> Result<(), TunnelError> {
        let began = Instant::now();
        self.listener.set_nonblocking(true)?;
        let mut number = 0;
        loop {
            let watch = [PollFd::new(&self.listener, PollFlags::IN)];
            let room = self.tunnel.facts().visits < VISITS_MAX;
            match self.tunnel.turn(if room { &watch } else { &[] }, file, began)? {
                Turn::Over => return Ok(()),
                Turn::Ready(ready) if ready.first() == Some(&true) => {}
                Turn::Ready(_) => continue,
            }
            match self.listener.accept() {
                Ok((net, _)) => {
                    number += 1;
                    if let Err(error) = self.admit(net, number) {
                        self.tunnel.refuse(&error);
                    }
                }
                // Also a connection that was reset while it waited, and a moment without descriptors.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => self.tunnel.refuse(&error),
            }
        }
    }

    fn admit(&self, net: TcpStream, number: u64) -> io::Result<()> {
        let handle = net.try_clone()?;
        {
            let mut facts = self.tunnel.facts();
            if facts.strangers.len() >= STRANGERS_MAX
                && let Some((_, oldest)) = facts.strangers.pop_front()
            {
                let _ = oldest.shutdown(Shutdown::Both);
            }
            facts.strangers.push_back((number, handle));
            facts.visits += 1;
        }
        let visit = Visit {
            tunnel: self.tunnel.clone(),
            config: self.config.clone(),
            incoming: self.incoming.to_owned(),
            number,
        };
        start(move || {
            visit.serve(net);
            visit.tunnel.change(|facts| facts.visits -= 1);
        })
        .inspect_err(|_| {
            let mut facts = self.tunnel.facts();
            facts.visits -= 1;
            facts.strangers.retain(|(known, _)| *known != number);
        })
    }
}

/// One connection that reached B, from stranger to relay.
struct Visit {
    tunnel: Arc<Tunnel>,
    config: Arc<ServerConfig>,
    incoming: std::path::PathBuf,
    number: u64,
}

impl Visit {
    fn serve(&self, net: TcpStream) {
        let known = self.recognise(net);
        self.tunnel
            .facts()
            .strangers
            .retain(|(number, _)| *number != self.number);
        let link = match known {
            Ok(link) => link,
            Err(error) => return self.tunnel.refuse(&error),
        };
        if !self.tunnel.take_slot() {
            return self.tunnel.refuse(&TooMany);
        }
        self.tunnel.change(|facts| {
            facts.connected.get_or_insert_with(Instant::now);
        });
        match self.begin(link) {
            Ok((link, local)) => self.tunnel.relay(link, local),
            Err(error) => self
                .tunnel
                .log(&format!("a channel did not begin: {}", model::story(&error))),
        }
        self.tunnel.slots.fetch_sub(1, Ordering::Relaxed);
    }

    fn recognise(&self, net: TcpStream) -> Result<Link, LinkError> {
        let tls = ServerConnection::new(self.config.clone())?;
        let mut link = Link::new(net, Connection::Server(tls), self.tunnel.spec.silence_max())?;
        link.recognise(&self.tunnel.spec.token, Instant::now() + HANDSHAKE_MAX)?;
        Ok(link)
    }

    fn begin(&self, mut link: Link) -> Result<(Link, UnixStream), LinkError> {
        link.welcome(Instant::now() + HANDSHAKE_MAX)?;
        link.wait_open(Instant::now() + self.tunnel.spec.begin_max())?;
        let local = UnixStream::connect(&self.incoming)?;
        // Counted before the source may send, so that the tunnel does not end between two channels.
        self.tunnel.opened();
        match link.opened(Instant::now() + HANDSHAKE_MAX) {
            Ok(()) => Ok((link, local)),
            Err(error) => {
                self.tunnel.change(|facts| facts.channels_open -= 1);
                Err(error)
            }
        }
    }
}

/// More connections than [`CHANNELS_MAX`].
#[derive(Debug, thiserror::Error)]
#[error("a migration has at most {CHANNELS_MAX} channels")]
struct TooMany;

fn start(work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    std::thread::Builder::new()
        .stack_size(THREAD_STACK_BYTES)
        .spawn(work)
        .map(drop)
}

fn bind_local(path: &Path) -> Result<UnixListener, TunnelError> {
    let failed = |source| TunnelError::Listen {
        at: path.display().to_string(),
        source,
    };
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    Ok(listener)
}
