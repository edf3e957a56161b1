//! The session with the controller: reports up, orders down, for as long as the agent lives.
//!
//! ```text
//!   connect ──▶ Hello ──▶ Accepted ──▶ facts, inventory, reports ⇅ orders, acks ──▶ lost ──▶ connect again, backing off
//! ```
//!
//! A controller that is away harms nobody: guests run, hand-overs that are under way go on, reports wait.

use std::{
    convert::Infallible,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::stream;
use http_body_util::{BodyExt, Limited, StreamBody, combinators::BoxBody};
use hyper::{
    Request, Response, StatusCode,
    body::{Frame, Incoming},
    client::conn::http2::{self, SendRequest},
};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use identity::{NodeIdentity, tls};
use model::{Code, HostFacts, Refusal, Report, host::Hypervisor, id::Sequence};
use tokio::{
    net::TcpStream,
    sync::mpsc,
    time::{interval, timeout},
};
use uuid::Uuid;
use wire::{
    Decoder, Down, Hello, Problem, Up,
    session::{FRAME_BYTES_MAX, HEARTBEAT, LOST_AFTER, SESSION_PATH},
};

use crate::{console, facts, reports, shared::Shared};

/// A body of a request to the controller.
pub(crate) type Body = BoxBody<Bytes, Infallible>;
/// The connection to the controller, to send more requests on.
pub(crate) type Link = SendRequest<Body>;

pub(crate) const CONNECT_MAX: Duration = Duration::from_secs(5);
/// Reports taken at once from the queue.
const BATCH: usize = 64;
/// Frames between the session's tasks.
const FRAMES_WAITING_MAX: usize = 256;
const BACKOFF_MIN: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// Between two tries of a host that was removed.
const REMOVED_AGAIN: Duration = Duration::from_secs(600);
/// Longest explanation of a refusal.
const PROBLEM_BYTES_MAX: usize = 64 << 10;
/// A session that stood this long begins again at the least back-off.
const STEADY: Duration = Duration::from_secs(10);

/// Why a session ended or did not begin.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SessionError {
    /// No connection.
    #[error("the controller cannot be reached")]
    Connect(#[from] std::io::Error),
    /// No answer.
    #[error("the controller does not answer")]
    Silent,
    /// Wrong certificate, ours or its.
    #[error("the controller and this host do not accept each other")]
    Tls(#[from] tls::TlsError),
    /// HTTP failed.
    #[error("the connection to the controller broke")]
    Http(#[from] hyper::Error),
    /// The request was turned down.
    #[error("the controller answered {0}")]
    Status(StatusCode),
    /// This host is not of the cell any more.
    #[error("this host was removed from the cell")]
    Removed(Refusal),
    /// It said no.
    #[error("the controller refused: {0}")]
    Refused(Refusal),
    /// A frame that cannot be read or written.
    #[error("the controller and this agent do not understand each other")]
    Frame(#[from] wire::FrameError),
    /// It ended what had begun.
    #[error("the controller ended the session: {0}")]
    Closed(String),
    /// The stream ended.
    #[error("the controller went away")]
    Ended,
}

/// Keeps a session with the controller for as long as the agent lives.
pub(crate) async fn keep(shared: Arc<Shared>, hypervisor: Hypervisor) {
    let incarnation = Uuid::now_v7();
    let (mut backoff, mut removed_before) = (BACKOFF_MIN, false);
    loop {
        let began = Instant::now();
        let ended = run(&shared, &hypervisor, incarnation).await;
        shared.set_link(None);
        match ended {
            Ok(never) => match never {},
            Err(SessionError::Removed(_)) => {
                removed(&shared, removed_before);
                removed_before = true;
                tokio::time::sleep(REMOVED_AGAIN).await;
                continue;
            }
            Err(error) => {
                tracing::warn!(
                    controller = shared.membership.controller,
                    error = &error as &dyn std::error::Error,
                    "no session"
                );
            }
        }
        if began.elapsed() > STEADY {
            backoff = BACKOFF_MIN;
        }
        tokio::time::sleep(backoff).await;
        backoff = (backoff * 2).min(BACKOFF_MAX);
    }
}

/// Says once that nobody wants this agent any more. Its guests are left alone: a controller that was restored from a backup may not
/// know a host that joined after it was made.
fn removed(shared: &Shared, before: bool) {
    if before {
        tracing::debug!("this host is still removed from the cell");
        return;
    }
    let host = shared.host();
    tracing::error!(
        "host {host} was removed from the cell of {}; it takes no more orders. To join again, stop this agent and start it with --join \
         and a fresh token: godwit host add-token",
        shared.membership.controller
    );
}

/// Asks what a session would be answered, and begins none.
pub(crate) async fn ask_standing(controller: &str, identity: &NodeIdentity) -> Result<Infallible, SessionError> {
    let mut link = connect(controller, identity).await?;
    let (_, no_frames) = mpsc::channel(1);
    let request = Request::post(SESSION_PATH)
        .body(body_of(no_frames))
        .map_err(|_| SessionError::Ended)?;
    let answer = timeout(CONNECT_MAX, link.send_request(request))
        .await
        .map_err(|_| SessionError::Silent)??;
    Err(refused(answer).await)
}

/// Why the controller turned a request down, if it says so in words.
pub(crate) async fn problem_of(body: Incoming) -> Option<Refusal> {
    let body = Limited::new(body, PROBLEM_BYTES_MAX).collect();
    let body = timeout(CONNECT_MAX, body).await.ok().and_then(Result::ok)?;
    let problem = serde_json::from_slice::<Problem>(&body.to_bytes()).ok();
    problem.map(Problem::into_refusal)
}

/// Why a session was not begun.
async fn refused(answer: Response<Incoming>) -> SessionError {
    let status = answer.status();
    match problem_of(answer.into_body()).await {
        Some(refusal) if refusal.code == Code::Forbidden => SessionError::Removed(refusal),
        Some(refusal) => SessionError::Refused(refusal),
        None => SessionError::Status(status),
    }
}

/// Why a session was ended by word.
fn closed(reason: Refusal) -> SessionError {
    match reason.code {
        Code::Forbidden => SessionError::Removed(reason),
        _ => SessionError::Closed(reason.message),
    }
}

async fn run(shared: &Arc<Shared>, hypervisor: &Hypervisor, incarnation: Uuid) -> Result<Infallible, SessionError> {
    let mut link = connect(&shared.membership.controller, &shared.identity()).await?;
    let (up, frames) = mpsc::channel::<Bytes>(FRAMES_WAITING_MAX);
    let hello = Up::Hello(Hello {
        version_min: wire::VERSION_MIN,
        version_max: wire::VERSION_MAX,
        build: env!("CARGO_PKG_VERSION").to_owned(),
        incarnation,
        acknowledged: shared.reports.acknowledged(),
        epoch: shared.epoch(),
    });
    send(&up, &hello).await?;
    let request = Request::post(SESSION_PATH)
        .body(body_of(frames))
        .map_err(|_| SessionError::Ended)?;
    let answer = timeout(CONNECT_MAX, link.send_request(request))
        .await
        .map_err(|_| SessionError::Silent)??;
    if answer.status() != StatusCode::OK {
        return Err(refused(answer).await);
    }
    let mut down = Frames::of(answer);
    let accepted = match down.next().await? {
        Down::Accepted(accepted) => accepted,
        Down::Close { reason } => return Err(closed(reason)),
        _ => return Err(SessionError::Ended),
    };
    tracing::info!(
        controller = shared.membership.controller,
        epoch = accepted.epoch.0,
        "session"
    );
    shared.reports.acknowledge(accepted.received);
    let facts = facts::facts(shared, hypervisor).await;
    shared.reports.push(Report::Facts(Box::new(facts.clone())));
    for part in reports::inventory(shared.inventory()) {
        shared.reports.push(part);
    }
    shared.set_link(Some(link));
    shared.set_progress(Some(up.clone()));
    let told = facts.pools.clone();
    let tell = |pools| {
        let facts = HostFacts { pools, ..facts.clone() };
        shared.reports.push(Report::Facts(Box::new(facts)));
    };
    tokio::select! {
        never = facts::keep_telling(shared, told, tell) => match never {},
        ended = say(shared, &up, accepted.received) => ended,
        ended = listen(shared, &up, &mut down) => ended,
    }
}

async fn connect(address: &str, identity: &NodeIdentity) -> Result<Link, SessionError> {
    let stream = timeout(CONNECT_MAX, TcpStream::connect(address))
        .await
        .map_err(|_| SessionError::Silent)??;
    stream.set_nodelay(true)?;
    let config = Arc::new(tls::to_controller(identity)?);
    let stream = tls::connect(&config, tls::unnamed(), stream, CONNECT_MAX).await?;
    let (link, connection) = http2::Builder::new(TokioExecutor::new())
        .initial_stream_window_size(1 << 20)
        .initial_connection_window_size(4 << 20)
        .timer(TokioTimer::new())
        .keep_alive_interval(HEARTBEAT)
        .keep_alive_timeout(LOST_AFTER)
        .handshake(TokioIo::new(stream))
        .await?;
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "the connection to the controller ended");
        }
    });
    Ok(link)
}

/// A body that is what a channel brings.
pub(crate) fn body_of(mut frames: mpsc::Receiver<Bytes>) -> Body {
    let frames =
        stream::poll_fn(move |context| frames.poll_recv(context).map(|bytes| bytes.map(|b| Ok(Frame::data(b)))));
    BodyExt::boxed(StreamBody::new(frames))
}

async fn send(up: &mpsc::Sender<Bytes>, frame: &Up) -> Result<(), SessionError> {
    up.send(wire::encode(frame, FRAME_BYTES_MAX)?)
        .await
        .map_err(|_| SessionError::Ended)
}

/// Sends reports as they come, and signs of life.
async fn say(shared: &Arc<Shared>, up: &mpsc::Sender<Bytes>, mut sent: Sequence) -> Result<Infallible, SessionError> {
    let mut beat = interval(HEARTBEAT);
    loop {
        tokio::select! {
            reports = shared.reports.after(sent, BATCH) => {
                for (sequence, frame) in reports {
                    up.send(frame).await.map_err(|_| SessionError::Ended)?;
                    sent = sequence;
                }
            }
            _ = beat.tick() => send(up, &Up::Heartbeat).await?,
        }
    }
}

/// Carries out what the controller says.
async fn listen(shared: &Arc<Shared>, up: &mpsc::Sender<Bytes>, down: &mut Frames) -> Result<Infallible, SessionError> {
    loop {
        let frame = timeout(LOST_AFTER, down.next())
            .await
            .map_err(|_| SessionError::Silent)??;
        match frame {
            Down::Order { order } => Shared::order(shared, order),
            Down::Ack { sequence } => shared.reports.acknowledge(sequence),
            Down::OpenConsole {
                console,
                vm,
                generation: _,
                ticket,
            } => {
                let (shared, up) = (Arc::clone(shared), up.clone());
                tokio::spawn(async move {
                    if let Err(reason) = console::serve(&shared, console, vm, &ticket).await {
                        // A session that ended takes its consoles with it.
                        let _ = send(&up, &Up::ConsoleRefused { console, reason }).await;
                    }
                });
            }
            Down::Close { reason } => return Err(closed(reason)),
            Down::Accepted(_) | Down::Heartbeat | Down::Other => {}
        }
    }
}

/// Frames of a response's body.
struct Frames {
    body: Incoming,
    decoder: Decoder,
}

impl Frames {
    fn of(answer: Response<Incoming>) -> Self {
        Self {
            body: answer.into_body(),
            decoder: Decoder::new(FRAME_BYTES_MAX),
        }
    }

    /// The next frame. Cancel-safe: what was read stays in the decoder.
    async fn next(&mut self) -> Result<Down, SessionError> {
        loop {
            if let Some(frame) = self.decoder.next_message()? {
                return Ok(frame);
            }
            match self.body.frame().await {
                Some(frame) => {
                    if let Some(bytes) = frame?.data_ref() {
                        self.decoder.push(bytes);
                    }
                }
                None => return Err(SessionError::Ended),
            }
        }
    }
}
