//! One connection to one QEMU: commands up, answers and events down.

use std::collections::BTreeMap;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::Value;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;

use crate::answer::Version;
use crate::codec::{Codec, Message, Request};
use crate::command::{Band, Command, QmpCapabilities};
use crate::error::{CloseReason, CommandError, ConnectError};
use crate::event::Event;

/// QEMU holds 8 commands and then stops reading, out-of-band ones too: one less leaves that way open.
const IN_FLIGHT_MAX: usize = 7;
/// Out-of-band commands end at once; more than these unanswered means that QEMU hangs altogether.
const URGENT_IN_FLIGHT_MAX: usize = 8;
/// Commands waiting for a place in flight; more callers wait in line for one.
const WAITING_MAX: usize = 64;
const READ_BYTES: usize = 64 * 1024;

/// The bounds of a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Longest line in either direction, in bytes. QEMU 10's `query-qmp-schema` takes 240 kB.
    pub line_bytes_max: usize,
    /// Longest event, in bytes.
    pub event_bytes_max: usize,
    /// Events waiting for their reader. From half of it on, inessential ones are dropped and counted.
    pub events_max: usize,
    /// How long QEMU has to greet.
    pub greeting_deadline: Duration,
    /// How long a command has, unless its caller says otherwise.
    pub command_deadline: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            line_bytes_max: 4 * 1024 * 1024,
            event_bytes_max: 64 * 1024,
            events_max: 512,
            greeting_deadline: Duration::from_secs(10),
            command_deadline: Duration::from_secs(10),
        }
    }
}

/// A handle of a session; clones share the connection, which ends with the last of them.
#[derive(Debug, Clone)]
pub struct Session {
    queue: mpsc::Sender<Job>,
    urgent: mpsc::Sender<Job>,
    closed: watch::Receiver<Option<CloseReason>>,
    next_id: Arc<AtomicU64>,
    /// QEMU takes out-of-band commands.
    out_of_band: bool,
    version: Version,
    limits: Limits,
}

/// The events of a session, in QEMU's order. Not reading them never delays an answer; dropping this ignores them.
#[derive(Debug)]
pub struct Events {
    queue: mpsc::Receiver<Event>,
    dropped: Arc<AtomicU64>,
}

impl Events {
    /// The next event; `None` once the session is closed and all were read ([`Session::closed`] says why).
    pub async fn recv(&mut self) -> Option<Event> {
        self.queue.recv().await
    }

    /// The next event that has come already. After an answer, this gives all that QEMU reported before it.
    pub fn try_recv(&mut self) -> Option<Event> {
        self.queue.try_recv().ok()
    }

    /// How many inessential events were dropped because this reader was slow.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }
}

impl Session {
    /// Connects to QEMU's socket and leaves negotiation mode.
    ///
    /// # Errors
    /// When nothing listens there, the peer does not greet in time, or it speaks no QMP.
    pub async fn connect(path: &Path, limits: Limits) -> Result<(Self, Events), ConnectError> {
        let stream = UnixStream::connect(path).await.map_err(|source| ConnectError::Socket {
            path: path.to_owned(),
            source,
        })?;
        Self::over(stream, limits).await
    }

    /// The same over a connected stream, such as one end of a socket pair given to QEMU.
    ///
    /// # Errors
    /// As [`Session::connect`].
    pub async fn over(stream: UnixStream, limits: Limits) -> Result<(Self, Events), ConnectError> {
        let mut codec = Codec::new(limits.line_bytes_max, limits.event_bytes_max);
        let (version, capabilities) = timeout(limits.greeting_deadline, greeting(&stream, &mut codec))
            .await
            .map_err(|_| ConnectError::NoGreeting(limits.greeting_deadline))?
            .map_err(ConnectError::Closed)?;

        let (queue_in, queue) = mpsc::channel(WAITING_MAX);
        let (urgent_in, urgent) = mpsc::channel(WAITING_MAX);
        let (events_in, events) = mpsc::channel(limits.events_max.max(2));
        let (closed_in, closed) = watch::channel(None);
        let dropped = Arc::new(AtomicU64::new(0));
        let connection = Connection {
            stream,
            codec,
            queue,
            urgent,
            events: events_in,
            dropped: Arc::clone(&dropped),
            pending: BTreeMap::new(),
            held: None,
            outgoing: None,
        };
        tokio::spawn(async move {
            let reason = connection.run().await;
            tracing::debug!(%reason, "QMP session ended");
            // Nobody left to tell is no failure.
            let _ = closed_in.send(Some(reason));
        });

        let mut session = Self {
            queue: queue_in,
            urgent: urgent_in,
            closed,
            next_id: Arc::default(),
            out_of_band: false,
            version,
            limits,
        };
        let out_of_band = capabilities.iter().any(|capability| capability == "oob");
        let enable = if out_of_band { vec!["oob"] } else { Vec::new() };
        session
            .execute(QmpCapabilities { enable })
            .await
            .map_err(|error| match error {
                CommandError::Closed { reason, .. } => ConnectError::Closed(reason),
                other => ConnectError::Refused(Box::new(other)),
            })?;
        session.out_of_band = out_of_band;
        Ok((session, Events { queue: events, dropped }))
    }

    /// QEMU's version, from its greeting.
    #[must_use]
    pub fn version(&self) -> &Version {
        &self.version
    }

    /// Runs a command within the session's usual deadline.
    ///
    /// Commands reach QEMU in the order of the calls' first poll. A call that is dropped, or whose deadline passes, may
    /// still take effect.
    ///
    /// # Errors
    /// When QEMU refuses it, does not answer in time or wrongly, or the session ends.
    pub async fn execute<C: Command>(&self, command: C) -> Result<C::Return, CommandError> {
        self.execute_within(command, self.limits.command_deadline).await
    }

    /// Runs a command within a deadline of its own.
    ///
    /// # Errors
    /// As [`Session::execute`].
    pub async fn execute_within<C: Command>(
        &self,
        mut command: C,
        deadline: Duration,
    ) -> Result<C::Return, CommandError> {
        let descriptor = command.take_descriptor();
        let name = command.name().to_owned();
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let urgent = C::BAND == Band::OutOfBand && self.out_of_band;
        let line = self.encode(&command, id, urgent)?;
        let (reply, answer) = oneshot::channel();
        let job = Job {
            id,
            line,
            descriptor,
            urgent,
            reply,
        };
        let queue = if urgent { &self.urgent } else { &self.queue };
        let exchange = async {
            queue.send(job).await.ok()?;
            answer.await.ok()
        };
        let answer = match timeout(deadline, exchange).await {
            Err(_) => {
                return Err(CommandError::Deadline {
                    command: name,
                    after: deadline,
                });
            }
            Ok(None) => {
                return Err(CommandError::Closed {
                    command: name,
                    reason: self.closed().await,
                });
            }
            Ok(Some(answer)) => answer,
        };
        match answer {
            Ok(value) => serde_json::from_value(value).map_err(|source| CommandError::Answer { command: name, source }),
            Err(Refusal { class, desc }) => Err(CommandError::Refused {
                command: name,
                class,
                desc,
            }),
        }
    }

    /// Waits for the end of the session and says why it ended.
    pub async fn closed(&self) -> CloseReason {
        let mut closed = self.closed.clone();
        match closed.wait_for(Option::is_some).await {
            Ok(reason) => reason.clone().unwrap_or(CloseReason::Released),
            // The task ended without a reason: the runtime shuts down.
            Err(_) => CloseReason::Released,
        }
    }

    fn encode<C: Command>(&self, command: &C, id: u64, urgent: bool) -> Result<Vec<u8>, CommandError> {
        let name = command.name();
        let encode = |why: String| CommandError::Encode {
            command: name.to_owned(),
            why,
        };
        let (execute, exec_oob) = if urgent { (None, Some(name)) } else { (Some(name), None) };
        let line = Request {
            execute,
            exec_oob,
            arguments: command,
            id,
        }
        .to_line()
        .map_err(|e| encode(e.to_string()))?;
        if line.len() > self.limits.line_bytes_max {
            return Err(encode(format!("longer than {} bytes", self.limits.line_bytes_max)));
        }
        Ok(line)
    }
}

struct Job {
    id: u64,
    line: Vec<u8>,
    descriptor: Option<OwnedFd>,
    urgent: bool,
    reply: oneshot::Sender<Answer>,
}

type Answer = Result<Value, Refusal>;

struct Refusal {
    class: String,
    desc: String,
}

/// A command that was sent. It stays here until QEMU answers, wanted or not, since it holds a place in QEMU's queue.
struct Pending {
    urgent: bool,
    descriptor: bool,
    reply: oneshot::Sender<Answer>,
}

struct Outgoing {
    line: Vec<u8>,
    sent: usize,
    descriptor: Option<OwnedFd>,
}

/// The side of the session that owns the socket.
struct Connection {
    stream: UnixStream,
    codec: Codec,
    queue: mpsc::Receiver<Job>,
    urgent: mpsc::Receiver<Job>,
    events: mpsc::Sender<Event>,
    dropped: Arc<AtomicU64>,
    pending: BTreeMap<u64, Pending>,
    /// The next command, when its descriptor has to wait for another's.
    held: Option<Job>,
    outgoing: Option<Outgoing>,
}

impl Connection {
    async fn run(mut self) -> CloseReason {
        let mut bytes = vec![0; READ_BYTES];
        loop {
            if let Err(reason) = self.dispatch_received() {
                return reason;
            }
            self.release_held();
            let idle = self.outgoing.is_none();
            let takes = idle && self.held.is_none() && self.in_flight(false) < IN_FLIGHT_MAX;
            let takes_urgent = idle && self.in_flight(true) < URGENT_IN_FLIGHT_MAX;
            let step = tokio::select! {
                ready = self.stream.readable() => ready.and_then(|()| self.read(&mut bytes)),
                ready = self.stream.writable(), if !idle => ready.and_then(|()| self.write()),
                job = self.urgent.recv(), if takes_urgent => match job {
                    Some(job) => { self.send(job); Ok(true) }
                    None => return CloseReason::Released,
                },
                job = self.queue.recv(), if takes => match job {
                    Some(job) => { self.held = Some(job); Ok(true) }
                    None => return CloseReason::Released,
                },
            };
            match step {
                Ok(true) => {}
                Ok(false) => return CloseReason::PeerClosed,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return lost(&error),
            }
        }
    }

    fn in_flight(&self, urgent: bool) -> usize {
        self.pending.values().filter(|pending| pending.urgent == urgent).count()
    }

    fn release_held(&mut self) {
        let descriptor_in_flight = self.pending.values().any(|pending| pending.descriptor);
        if self.outgoing.is_none()
            && let Some(job) = self
                .held
                .take_if(|job| job.descriptor.is_none() || !descriptor_in_flight)
        {
            self.send(job);
        }
    }

    fn send(&mut self, job: Job) {
        let Job {
            id,
            line,
            descriptor,
            urgent,
            reply,
        } = job;
        if reply.is_closed() {
            return; // Its deadline passed while it waited: nobody wants it done any more.
        }
        self.pending.insert(
            id,
            Pending {
                urgent,
                descriptor: descriptor.is_some(),
                reply,
            },
        );
        self.outgoing = Some(Outgoing {
            line,
            sent: 0,
            descriptor,
        });
    }

    /// False at the end of the stream.
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<bool> {
        let count = self.stream.try_read(bytes)?;
        self.codec.push(&bytes[..count]);
        Ok(count > 0)
    }

    fn write(&mut self) -> io::Result<bool> {
        let Some(outgoing) = &mut self.outgoing else {
            return Ok(true);
        };
        let stream = &self.stream;
        let rest = &outgoing.line[outgoing.sent..];
        let count = match stream.try_io(Interest::WRITABLE, || {
            send_with(stream, rest, outgoing.descriptor.as_ref())
        }) {
            // What QEMU said before it went is still to be read: the end of the stream ends the session.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => outgoing.line.len(),
            count => count?,
        };
        // The descriptor went with the first byte; ours is closed here.
        outgoing.descriptor = None;
        outgoing.sent += count;
        if outgoing.sent >= outgoing.line.len() {
            self.outgoing = None;
        }
        Ok(true)
    }

    fn dispatch_received(&mut self) -> Result<(), CloseReason> {
        while let Some(message) = self.codec.next_message().map_err(CloseReason::Codec)? {
            match message {
                Message::Return { id, value } => self.answer(id, Ok(value))?,
                Message::Error {
                    id: Some(id),
                    class,
                    desc,
                } => self.answer(id, Err(Refusal { class, desc }))?,
                Message::Error { id: None, class, desc } => {
                    return Err(CloseReason::OutOfStep(format!("{class}: {desc}")));
                }
                Message::Greeting { .. } => return Err(CloseReason::OutOfStep("a second greeting".to_owned())),
                Message::Event(event) => self.deliver(event)?,
            }
        }
        Ok(())
    }

    fn answer(&mut self, id: u64, answer: Answer) -> Result<(), CloseReason> {
        let pending = self
            .pending
            .remove(&id)
            .ok_or_else(|| CloseReason::OutOfStep(format!("an answer to command {id}, which does not wait for one")))?;
        // The caller may have given up: its deadline passed.
        let _ = pending.reply.send(answer);
        Ok(())
    }

    fn deliver(&mut self, event: Event) -> Result<(), CloseReason> {
        let bound = self.events.max_capacity();
        if !event.is_essential() && self.events.capacity() <= bound / 2 {
            self.dropped.fetch_add(1, Ordering::Relaxed);
            return Ok(());
        }
        match self.events.try_send(event) {
            Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => Ok(()),
            Err(mpsc::error::TrySendError::Full(_)) => Err(CloseReason::EventOverflow { bound }),
        }
    }
}

async fn greeting(stream: &UnixStream, codec: &mut Codec) -> Result<(Version, Vec<String>), CloseReason> {
    let mut bytes = vec![0; READ_BYTES];
    loop {
        match codec.next_message().map_err(CloseReason::Codec)? {
            Some(Message::Greeting { version, capabilities }) => return Ok((version, capabilities)),
            Some(_) => return Err(CloseReason::OutOfStep("no greeting at the start".to_owned())),
            None => {}
        }
        stream.readable().await.map_err(|error| lost(&error))?;
        match stream.try_read(&mut bytes) {
            Ok(0) => return Err(CloseReason::PeerClosed),
            Ok(count) => codec.push(&bytes[..count]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(lost(&error)),
        }
    }
}

/// Sends what the socket takes of `bytes`, and `descriptor` with the first of them.
fn send_with(stream: &UnixStream, bytes: &[u8], descriptor: Option<&OwnedFd>) -> io::Result<usize> {
    let descriptors: Vec<_> = descriptor.iter().map(|descriptor| descriptor.as_fd()).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(io::Error::other("no room for a descriptor"));
    }
    Ok(sendmsg(
        stream,
        &[io::IoSlice::new(bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?)
}

fn lost(error: &io::Error) -> CloseReason {
    match error.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => CloseReason::PeerClosed,
        _ => CloseReason::Io(error.to_string()),
    }
}
