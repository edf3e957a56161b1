//! One session of an agent: frames up are checked, numbered and given to the loop; frames down wait for the agent to read.
//!
//! ```text
//!   connecting ──hello──▶ live ──silence, gap, error, newer session, read-only──▶ closed (a reason is sent if it is read)
//! ```

use std::{collections::VecDeque, io, time::Duration};

use axum::{
    body::{Body, BodyDataStream},
    extract::{Extension, State},
    response::Response,
};
use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, stream};
use model::{HostId, Order, Refusal, Report, refusal::Code, story};
use serde::Serialize;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Instant, Interval, MissedTickBehavior, interval, timeout},
};
use wire::{
    Accepted, Decoder, Down, Hello, Up,
    session::{FRAME_BYTES_MAX, HEARTBEAT, LOST_AFTER},
};

use super::{Agents, Refused, known};
use crate::core::{Connect, Connected, Input, SessionState};

/// Longest wait for the first frame.
const HELLO_MAX: Duration = Duration::from_secs(10);

/// How long the agent may take to read why its session was closed.
const CLOSING_MAX: Duration = Duration::from_secs(5);

/// Orders written at a time, so that what is held for a slow agent is bounded.
const ORDERS_A_PIECE: usize = 16;

pub(super) async fn open(
    State(agents): State<Agents>,
    Extension(host): Extension<HostId>,
    body: Body,
) -> Result<Response, Refused> {
    known(&agents, host)?;
    let mut frames = Frames::new(body);
    let hello = match timeout(HELLO_MAX, frames.next()).await {
        Ok(Ok(Up::Hello(hello))) => hello,
        Ok(Err(End::Wrong(story))) => return Err(refused(story)),
        Ok(_) => return Err(refused("a session begins with a hello")),
        Err(_) => return Err(refused("no hello came in time")),
    };
    let Some(version) = wire::negotiate(hello.version_min, hello.version_max) else {
        let message = format!(
            "the agent speaks versions {} to {} of the protocol, this controller {} to {}",
            hello.version_min,
            hello.version_max,
            wire::VERSION_MIN,
            wire::VERSION_MAX
        );
        let refusal = Refusal::new(Code::Incompatible, message);
        return Err(Refused(refusal.hint("upgrade the older of the two")));
    };
    let (connected, session) = connect(&agents, host, &hello).await.map_err(Refused)?;
    tracing::info!(%host, build = hello.build, "agent connected");
    let accepted = Accepted {
        version,
        build: env!("CARGO_PKG_VERSION").to_owned(),
        epoch: connected.epoch,
        received: connected.received,
    };
    let (closing, closed) = oneshot::channel();
    let reader = Reader {
        agents,
        host,
        session,
        frames,
        closing,
        state: connected.state.clone(),
    };
    tokio::spawn(reader.run());
    let body = Body::from_stream(write(Writer::new(accepted, connected, closed)));
    Ok(Response::new(body))
}

fn refused(why: impl Into<String>) -> Refused {
    Refused(Refusal::new(Code::InvalidInput, why))
}

async fn connect(agents: &Agents, host: HostId, hello: &Hello) -> Result<(Connected, uuid::Uuid), Refusal> {
    let session = uuid::Uuid::now_v7();
    let (reply, answer) = oneshot::channel();
    let connect = Connect {
        host,
        session,
        incarnation: hello.incarnation,
        acknowledged: hello.acknowledged,
        epoch: hello.epoch,
        reply,
    };
    let stopping = || Refusal::new(Code::Overloaded, "the controller is stopping").hint("connect again");
    agents
        .inputs
        .send(Input::Connect(connect))
        .await
        .map_err(|_| stopping())?;
    let connected = answer.await.map_err(|_| stopping())??;
    Ok((connected, session))
}

/// Frames of a body.
struct Frames {
    body: BodyDataStream,
    decoder: Decoder,
}

impl Frames {
    fn new(body: Body) -> Self {
        Self {
            body: body.into_data_stream(),
            decoder: Decoder::new(FRAME_BYTES_MAX),
        }
    }

    /// The next frame. Bytes of a long frame that is still under way are a sign of life.
    async fn next(&mut self) -> Result<Up, End> {
        loop {
            if let Some(frame) = self.decoder.next_message().map_err(|error| End::Wrong(story(&error)))? {
                return Ok(frame);
            }
            match timeout(LOST_AFTER, self.body.next()).await {
                Ok(Some(Ok(piece))) => self.decoder.push(&piece),
                Ok(Some(Err(error))) => return Err(End::Wrong(error.to_string())),
                Ok(None) => {
                    self.decoder.finish().map_err(|error| End::Wrong(story(&error)))?;
                    return Err(End::Closed);
                }
                Err(_) => return Err(End::Silent),
            }
        }
    }
}

/// Reads until the agent is silent, gone or wrong, or the loop lets go of it.
struct Reader {
    agents: Agents,
    host: HostId,
    session: uuid::Uuid,
    frames: Frames,
    /// Has the writer say why; closed when nobody writes any more.
    closing: oneshot::Sender<Refusal>,
    state: watch::Receiver<SessionState>,
}

/// How a session's reading ends.
enum End {
    /// The connection is gone, or the loop or the agent has closed the session.
    Closed,
    Silent,
    Wrong(String),
}

impl Reader {
    async fn run(mut self) {
        let end = self.read().await;
        let host = self.host;
        let why = match end {
            End::Closed => None,
            End::Silent => Some(format!("nothing was heard for {} s", LOST_AFTER.as_secs())),
            End::Wrong(ref story) => Some(story.clone()),
        };
        tracing::info!(%host, why = why.as_deref().unwrap_or("closed"), "an agent's session ended");
        if let Some(why) = why {
            // Nobody may be there to read it.
            let _ = self.closing.send(Refusal::new(Code::InvalidInput, why));
        }
        if self.state.borrow().close.is_none() {
            self.agents.consoles.gone(host);
        }
        let gone = Input::Gone {
            host,
            session: self.session,
            silent: matches!(end, End::Silent),
        };
        // The loop ends only with the process.
        let _ = self.agents.inputs.send(gone).await;
    }

    async fn read(&mut self) -> End {
        let let_go = let_go(self.state.clone());
        tokio::pin!(let_go);
        loop {
            let frame = tokio::select! {
                frame = self.frames.next() => frame,
                () = self.closing.closed() => return End::Closed,
                () = &mut let_go => return End::Closed,
            };
            let frame = match frame {
                Ok(frame) => frame,
                Err(end) => return end,
            };
            if let Err(end) = take(&self.agents, self.host, self.session, frame).await {
                return end;
            }
        }
    }
}

/// Ends a while after the loop has let go of the session: the agent had time to read why.
async fn let_go(mut state: watch::Receiver<SessionState>) {
    let _ = state.wait_for(|state| state.close.is_some()).await;
    tokio::time::sleep(CLOSING_MAX).await;
}

/// One frame. An error ends the session.
async fn take(agents: &Agents, host: HostId, session: uuid::Uuid, frame: Up) -> Result<(), End> {
    match frame {
        Up::Report { sequence, mut report } => {
            if let Report::Relay(relay) = &mut report {
                // A compromised agent speaks for itself only.
                relay.from = host;
            }
            let input = Input::Report {
                host,
                session,
                sequence,
                report: Box::new(report),
            };
            // Waits while the loop is behind; the agent's stream then fills up and it waits too.
            agents.inputs.send(input).await.map_err(|_| End::Closed)
        }
        Up::Progress { operation, progress } => {
            let report = Box::new(Report::Progress { operation, progress });
            // Telemetry gives way.
            let _ = agents.inputs.try_send(Input::Progress { host, session, report });
            Ok(())
        }
        Up::Telemetry { telemetry } => {
            agents
                .telemetry
                .take(host, *telemetry, &agents.committed, agents.clock.now());
            Ok(())
        }
        Up::Ports { ports } => {
            let bound = agents.committed.bound(ports.iter().map(|told| told.port));
            agents
                .meters
                .take(host, &ports, |port| bound.get(&port).map(|(_, host)| *host));
            Ok(())
        }
        Up::ConsoleRefused { console, reason } => {
            agents.consoles.refuse(console, host, reason);
            Ok(())
        }
        Up::Heartbeat | Up::Other => Ok(()),
        Up::Close { reason } => {
            tracing::info!(%host, %reason, "agent closes its session");
            Err(End::Closed)
        }
        Up::Hello(_) => Err(End::Wrong("a second hello".to_owned())),
    }
}

/// What goes down, made as the agent reads it.
struct Writer {
    first: Option<Accepted>,
    outbox: VecDeque<Order>,
    orders: mpsc::Receiver<Down>,
    state: watch::Receiver<SessionState>,
    closed: oneshot::Receiver<Refusal>,
    heartbeat: Interval,
    ended: bool,
}

impl Writer {
    fn new(accepted: Accepted, connected: Connected, closed: oneshot::Receiver<Refusal>) -> Self {
        let mut heartbeat = interval(HEARTBEAT);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self {
            first: Some(accepted),
            outbox: connected.outbox.into(),
            orders: connected.orders,
            state: connected.state,
            closed,
            heartbeat,
            ended: false,
        }
    }

    async fn next(&mut self) -> Option<io::Result<Bytes>> {
        if self.ended {
            return None;
        }
        if let Some(accepted) = self.first.take() {
            return Some(frame(&Down::Accepted(accepted)));
        }
        if !self.outbox.is_empty() {
            return Some(self.outbox_piece());
        }
        let down = tokio::select! {
            biased;
            reason = &mut self.closed => {
                self.ended = true;
                match reason {
                    Ok(reason) => Down::Close { reason },
                    Err(_) => return None,
                }
            }
            changed = self.state.changed() => match self.news(changed.is_ok()) {
                Some(down) => down,
                None => return None,
            },
            order = self.orders.recv() => match order {
                Some(down) => down,
                None => self.closing(),
            },
            _ = self.heartbeat.tick() => Down::Heartbeat,
        };
        self.heartbeat.reset_at(Instant::now() + HEARTBEAT);
        Some(frame(&down))
    }

    fn outbox_piece(&mut self) -> io::Result<Bytes> {
        let mut piece = Vec::new();
        for order in self.outbox.drain(..self.outbox.len().min(ORDERS_A_PIECE)) {
            piece.extend_from_slice(&frame(&Down::Order { order })?);
        }
        Ok(piece.into())
    }

    /// What the loop has to say besides orders.
    fn news(&mut self, is_open: bool) -> Option<Down> {
        if !is_open {
            return Some(self.closing());
        }
        let state = self.state.borrow_and_update();
        if let Some(reason) = state.close.clone() {
            drop(state);
            self.ended = true;
            return Some(Down::Close { reason });
        }
        let acknowledged = state.acknowledged;
        drop(state);
        Some(Down::Ack { sequence: acknowledged })
    }

    /// The loop has let go of the session; the state says why, if there is a reason.
    fn closing(&mut self) -> Down {
        self.ended = true;
        let reason = self.state.borrow().close.clone();
        let reason = reason.unwrap_or_else(|| Refusal::new(Code::Overloaded, "the controller is stopping"));
        Down::Close { reason }
    }
}

fn write(writer: Writer) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static {
    stream::unfold(writer, |mut writer| async move {
        let piece = writer.next().await?;
        Some((piece, writer))
    })
}

fn frame(down: &impl Serialize) -> io::Result<Bytes> {
    wire::encode(down, FRAME_BYTES_MAX).map_err(io::Error::other)
}
