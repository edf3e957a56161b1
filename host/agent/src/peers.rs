//! Words between two agents about a hand-over, what the guest missed in it, and blobs lent, over their own mutual TLS connections.
//!
//! ```text
//!   source's agent ── dials when a copy begins ──▶ destination's agent      words go both ways on it
//!        └────────────── controller ◀──────────────────┘                    where it is cut: Report::Relay
//! ```
//!
//! Whoever dials keeps the connection for as long as there are words to say. A word that cannot be said is said by way of the
//! controller; words are repeated by their tasks, so none needs to be kept here.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use identity::{Role, tls};
use model::{
    Digest, HostId, Report,
    order::{Holder, Relay},
};
use task::Input;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc, watch},
    task::JoinHandle,
    time::timeout,
};
use wire::{Decoder, Peer, peer::FRAME_BYTES_MAX};

use crate::{
    blobs::{self, Lender},
    runner::Fed,
    shared::Shared,
    standstill::{self, Portion},
};

/// Words waiting on one connection. More means that it is stuck; they are repeated anyway.
const WAITING_MAX: usize = 64;
/// Portions of guests' frames waiting to be sent on one connection.
const PORTIONS_SENT_MAX: usize = 4;
/// Portions that came on one connection and wait to be given: all of one port's hand-over.
const PORTIONS_GIVEN_MAX: usize = 64;
/// Connections of other agents at once.
const CONNECTIONS_MAX: usize = 256;
const HANDSHAKE_MAX: Duration = Duration::from_secs(5);
/// Between two tries to accept a connection where that failed: descriptors do not come back at once.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);
const HEARTBEAT: Duration = Duration::from_secs(2);
/// A host that lends waits for the controller's word, and for its turn.
const BORROW_MAX: Duration = Duration::from_secs(40);
/// Longest reason of another host, characters.
const REASON_MAX: usize = 300;
/// After this long without a byte the connection is lost.
const LOST_AFTER: Duration = Duration::from_secs(10);

/// Between two tries to connect to an agent that a hand-over waits for.
const DIAL_AGAIN: Duration = Duration::from_millis(250);

/// Why a connection between agents ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkError {
    #[error("the connection failed")]
    Io(#[from] std::io::Error),
    #[error("the other side is not the host that was expected")]
    Tls(#[from] tls::TlsError),
    #[error("the other side sent what cannot be read")]
    Frame(#[from] wire::FrameError),
    #[error("the other side speaks no common version")]
    Version,
    #[error("the other side was silent for too long")]
    Silent,
    #[error("{0}")]
    NotLent(String),
}

/// The connections to other agents.
#[derive(Debug, Default)]
pub(crate) struct Peers {
    links: Mutex<BTreeMap<HostId, Link>>,
}

/// A connection, or one that is being made.
#[derive(Clone, Debug)]
struct Link {
    words: mpsc::Sender<Relay>,
    /// What goes after a guest.
    portions: mpsc::Sender<Portion>,
    /// Whether the other side has answered. Until then a word may wait here for a host that is not there any more.
    up: watch::Receiver<bool>,
}

impl Link {
    fn new(up: bool) -> (Self, Queues, watch::Sender<bool>) {
        let (words, queue) = mpsc::channel(WAITING_MAX);
        let (portions, sent) = mpsc::channel(PORTIONS_SENT_MAX);
        let (set_up, up) = watch::channel(up);
        let queues = Queues {
            words: queue,
            portions: sent,
        };
        (Self { words, portions, up }, queues, set_up)
    }
}

/// What waits to be sent on a connection.
struct Queues {
    words: mpsc::Receiver<Relay>,
    portions: mpsc::Receiver<Portion>,
}

impl Peers {
    /// Says a word: directly where there is a connection; by way of the controller where there is none, where it is only being
    /// made, or when `also_relay`. A guest may stand until the word is heard, so it does not wait for a connection to fail.
    pub(crate) fn say(&self, shared: &Shared, word: Relay, also_relay: bool) {
        let direct = self
            .lock()
            .get(&word.to)
            .is_some_and(|link| link.words.try_send(word).is_ok() && *link.up.borrow());
        // Without a session it would only wait, and be old: words are repeated as long as they matter.
        if (!direct || also_relay) && shared.link().is_some() {
            shared.reports.push(Report::Relay(word));
        }
    }

    /// Hands over a portion of what goes after a guest, as soon as there is room for it; whether there is a connection that may carry it.
    pub(crate) async fn hand_over(&self, host: HostId, portion: Portion) -> bool {
        let Some(queue) = self.lock().get(&host).map(|link| link.portions.clone()) else {
            return false;
        };
        matches!(timeout(LOST_AFTER, queue.send(portion)).await, Ok(Ok(())))
    }

    /// Makes sure that there is a connection to a host, or that one is being made.
    pub(crate) fn ensure(self: &Arc<Self>, shared: &Arc<Shared>, host: HostId, address: SocketAddr) {
        let (up, queues) = {
            let mut links = self.lock();
            if links.get(&host).is_some_and(|link| !link.words.is_closed()) {
                return;
            }
            let (link, queues, up) = Link::new(false);
            links.insert(host, link);
            (up, queues)
        };
        let shared = Arc::clone(shared);
        tokio::spawn(async move {
            if let Err(error) = dial(&shared, host, address, &up, queues).await {
                tracing::warn!(%host, %address, error = &error as &dyn std::error::Error, "no connection to the other agent");
            }
        });
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<HostId, Link>> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tells a VM's runner whether another host's agent hears us, and keeps a connection to it, until this is dropped.
#[derive(Debug)]
pub(crate) struct PeerWatch(JoinHandle<()>);

impl Drop for PeerWatch {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl PeerWatch {
    pub(crate) fn begin(shared: &Arc<Shared>, host: HostId, address: SocketAddr, fed: mpsc::Sender<Fed>) -> Self {
        // At once: the stream waits for it.
        shared.peers.ensure(shared, host, address);
        let shared = Arc::clone(shared);
        Self(tokio::spawn(async move {
            loop {
                shared.peers.ensure(&shared, host, address);
                let link = shared.peers.lock().get(&host).cloned();
                if let Some(mut link) = link {
                    let up = tokio::select! {
                        up = link.up.wait_for(|up| *up) => up.is_ok(),
                        () = link.words.closed() => false,
                    };
                    if up {
                        // A runner that has ended wants to hear nothing.
                        let _ = fed.send(Fed::Input(Input::PeerLink { up: true })).await;
                        link.words.closed().await;
                        let _ = fed.send(Fed::Input(Input::PeerLink { up: false })).await;
                    }
                }
                tokio::time::sleep(DIAL_AGAIN).await;
            }
        }))
    }
}

async fn dial(
    shared: &Arc<Shared>,
    host: HostId,
    address: SocketAddr,
    up: &watch::Sender<bool>,
    queues: Queues,
) -> Result<(), LinkError> {
    let config = tls::to_host(&shared.identity(), host.0)?;
    let stream = timeout(HANDSHAKE_MAX, TcpStream::connect(address))
        .await
        .map_err(|_| LinkError::Silent)??;
    stream.set_nodelay(true)?;
    let mut stream = tls::connect(&Arc::new(config), tls::unnamed(), stream, HANDSHAKE_MAX).await?;
    let hello = Peer::Hello {
        version_min: wire::VERSION_MIN,
        version_max: wire::VERSION_MAX,
    };
    put(&mut stream, &hello).await?;
    let mut decoder = Decoder::new(FRAME_BYTES_MAX);
    // A host that stopped just now has a connection that never ends.
    match timeout(HANDSHAKE_MAX, next(&mut stream, &mut decoder))
        .await
        .map_err(|_| LinkError::Silent)??
    {
        Some(Peer::Accepted { version }) if (wire::VERSION_MIN..=wire::VERSION_MAX).contains(&version) => {
            up.send_replace(true);
        }
        _ => return Err(LinkError::Version),
    }
    talk(shared, host, stream, decoder, queues).await
}

/// Asks a host for a blob from its `from`th byte on: a stream of them, and how many the blob has in all.
pub(crate) async fn borrow(
    shared: &Shared,
    holder: Holder,
    digest: Digest,
    from_bytes: u64,
) -> Result<(Box<dyn Lender>, u64), LinkError> {
    let config = tls::to_host(&shared.identity(), holder.host.0)?;
    let stream = timeout(HANDSHAKE_MAX, TcpStream::connect((holder.address, holder.peer_port)))
        .await
        .map_err(|_| LinkError::Silent)??;
    let mut stream = tls::connect(&Arc::new(config), tls::unnamed(), stream, HANDSHAKE_MAX).await?;
    let borrow = Peer::Borrow {
        version_min: wire::VERSION_MIN,
        version_max: wire::VERSION_MAX,
        digest,
        from_bytes,
    };
    put(&mut stream, &borrow).await?;
    match timeout(BORROW_MAX, next_exactly(&mut stream))
        .await
        .map_err(|_| LinkError::Silent)??
    {
        Peer::Lent { size_bytes } => Ok((Box::new(stream), size_bytes)),
        Peer::NotLent { reason } => Err(LinkError::NotLent(reason.chars().take(REASON_MAX).collect())),
        _ => Err(LinkError::Version),
    }
}

/// The next frame of a stream on which something else than frames may follow.
async fn next_exactly<S: AsyncRead + Unpin>(stream: &mut S) -> Result<Peer, LinkError> {
    let mut decoder = Decoder::new(FRAME_BYTES_MAX);
    loop {
        if let Some(frame) = decoder.next_message()? {
            return Ok(frame);
        }
        // Frames of words are short, and this is read once: what follows must stay in the stream.
        decoder.push(&[stream.read_u8().await?]);
    }
}

/// Accepts other agents' connections for as long as the agent lives.
pub(crate) async fn listen(shared: Arc<Shared>, listener: TcpListener) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return;
        };
        let (stream, address) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors, or the caller was gone already: neither is the listener's end.
                tracing::warn!(%error, "an agent's connection was not accepted");
                tokio::time::sleep(ACCEPT_AGAIN).await;
                continue;
            }
        };
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            if let Err(error) = accept(&shared, stream).await {
                tracing::debug!(%address, error = &error as &dyn std::error::Error, "an agent's connection ended");
            }
            drop(place);
        });
    }
}

async fn accept(shared: &Arc<Shared>, stream: TcpStream) -> Result<(), LinkError> {
    stream.set_nodelay(true)?;
    let config = Arc::new(tls::agents_port(&shared.identity())?);
    let mut stream = tls::accept(&config, stream, HANDSHAKE_MAX).await?;
    let Role::Host(host) = tls::peer_of(&stream)?.role else {
        return Err(LinkError::Version);
    };
    let host = HostId(host);
    let mut decoder = Decoder::new(FRAME_BYTES_MAX);
    let version = match timeout(HANDSHAKE_MAX, next(&mut stream, &mut decoder))
        .await
        .map_err(|_| LinkError::Silent)??
    {
        Some(Peer::Hello {
            version_min,
            version_max,
        }) => wire::negotiate(version_min, version_max),
        Some(Peer::Borrow {
            version_min,
            version_max,
            digest,
            from_bytes,
        }) if wire::negotiate(version_min, version_max).is_some() => {
            return blobs::lend(shared, host, digest, from_bytes, &mut stream).await;
        }
        _ => None,
    };
    let version = version.ok_or(LinkError::Version)?;
    put(&mut stream, &Peer::Accepted { version }).await?;
    let (link, queues, _up) = Link::new(true);
    shared.peers.lock().insert(host, link);
    talk(shared, host, stream, decoder, queues).await
}

/// Carries words and frames both ways until the connection ends. Hearing does not wait for saying: two sides that both wait for the
/// other to hear would wait for ever.
async fn talk<S: AsyncRead + AsyncWrite + Send + 'static>(
    shared: &Arc<Shared>,
    host: HostId,
    stream: S,
    decoder: Decoder,
    queues: Queues,
) -> Result<(), LinkError> {
    let (from, to) = tokio::io::split(stream);
    tokio::select! {
        ended = hear_all(shared, host, from, decoder) => ended,
        ended = say_all(to, queues) => ended,
    }
}

async fn hear_all<S: AsyncRead + Unpin>(
    shared: &Arc<Shared>,
    host: HostId,
    mut from: S,
    mut decoder: Decoder,
) -> Result<(), LinkError> {
    let (given, portions) = mpsc::channel(PORTIONS_GIVEN_MAX);
    tokio::spawn(standstill::give_all(Arc::clone(shared), host, portions));
    loop {
        // Our own heartbeats do not put the deadline off: only what is heard does.
        match timeout(LOST_AFTER, next(&mut from, &mut decoder))
            .await
            .map_err(|_| LinkError::Silent)??
        {
            // Whoever speaks may speak only for the host in its certificate.
            Some(Peer::Word(word)) if word.from == host && word.to == shared.host() => shared.hear(word),
            // Words do not wait for guests: what comes faster than it can be given is lost, as on any network.
            Some(Peer::Missed(missed)) => drop(given.try_send(Portion::Frames(missed))),
            Some(Peer::Port(state)) => drop(given.try_send(Portion::Port(state))),
            Some(_) => {}
            None => return Ok(()),
        }
    }
}

/// Says what waits, words first, and a sign of life now and then.
async fn say_all<S: AsyncWrite + Unpin>(mut to: S, mut queues: Queues) -> Result<(), LinkError> {
    let mut beat = tokio::time::interval(HEARTBEAT);
    loop {
        let frame = tokio::select! {
            biased;
            word = queues.words.recv() => match word {
                Some(word) => Peer::Word(word),
                None => return Ok(()),
            },
            _ = beat.tick() => Peer::Heartbeat,
            Some(portion) = queues.portions.recv() => match portion {
                Portion::Frames(missed) => Peer::Missed(missed),
                Portion::Port(state) => Peer::Port(state),
            },
        };
        put(&mut to, &frame).await?;
    }
}

/// Sends a frame; one that is not taken in time ends the connection.
pub(crate) async fn put<S: AsyncWrite + Unpin>(stream: &mut S, frame: &Peer) -> Result<(), LinkError> {
    let bytes = wire::encode(frame, FRAME_BYTES_MAX)?;
    timeout(LOST_AFTER, async {
        stream.write_all(&bytes).await?;
        stream.flush().await
    })
    .await
    .map_err(|_| LinkError::Silent)??;
    Ok(())
}

/// The next frame; `None` at the end. Cancel-safe: what was read stays in the decoder.
async fn next<S: AsyncRead + Unpin>(stream: &mut S, decoder: &mut Decoder) -> Result<Option<Peer>, LinkError> {
    loop {
        if let Some(frame) = decoder.next_message()? {
            return Ok(Some(frame));
        }
        let mut bytes = [0; 4096];
        match stream.read(&mut bytes).await? {
            0 => return Ok(None),
            n => decoder.push(&bytes[..n]),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test ends where its promise is broken")]

    use super::*;
    use crate::fixture::{Cell, host_id};

    #[tokio::test]
    async fn a_host_that_falls_silent_before_its_first_word_is_given_up_and_dialled_again() {
        let cell = Cell::new();
        let shared = cell.host(1).await;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let config = Arc::new(tls::agents_port(&cell.identity(2)).unwrap());
        let (came, mut comes) = mpsc::channel(4);
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let stream = tls::accept(&config, stream, HANDSHAKE_MAX).await.unwrap();
                came.send(stream).await.unwrap();
            }
        });
        let peers = Arc::clone(&shared.peers);
        peers.ensure(&shared, host_id(2), address);
        let first = comes.recv().await.unwrap();
        let words = peers.lock()[&host_id(2)].words.clone();
        timeout(3 * HANDSHAKE_MAX, words.closed()).await.unwrap();
        peers.ensure(&shared, host_id(2), address);
        timeout(HANDSHAKE_MAX, comes.recv()).await.unwrap().unwrap();
        drop(first);
    }
}
