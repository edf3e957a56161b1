//! The loop: one task owns the world. It takes events in batches, lets the engine decide, commits once, and only then lets anything out.
//!
//! ```text
//!   inputs (bounded) ─▶ batch ─▶ reads answered from the committed world
//!                         └────▶ engine::step, each ─▶ one commit ─▶ replies, orders, acknowledgements, notices
//!                                                        │ failed
//!                                                        ▼
//!                     nothing leaves; the world is loaded again ─▶ refused: go on, one event a batch for a while
//!                                                               ─▶ disk:    read-only until the store recovers
//!                                                               ─▶ deposed: the process ends
//! ```

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use engine::World;
use model::{
    Change, Effect, Epoch, Event, HostId, Key, Outcome, Refusal, Report, Request, RequestId, Row, Timestamp,
    id::Sequence, refusal::Code,
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::Instant,
};
use uuid::Uuid;
use wire::Down;

pub(crate) use crate::links::{Connected, SessionState};
use crate::{
    clock::Clock,
    committed::Committed,
    links::{Ends, Links, Verdict},
    metrics::Metrics,
    storage::{Storage, StorageError, Stored},
};

/// Inputs that wait for the loop.
pub(crate) const INPUTS_MAX: usize = 1024;

/// Events that one commit covers at most.
const BATCH_MAX: usize = 256;

/// Time between two ticks at most, and between two attempts to write again.
const TICK: Duration = Duration::from_secs(1);

/// Time between two ticks at least.
const TICK_MIN: Duration = Duration::from_millis(5);

/// After the store refused a batch, so many events are committed each alone: whatever it refuses then harms nobody else.
const CAREFUL: usize = 2 * BATCH_MAX;

/// A read of the committed world.
pub(crate) type Ask = Box<dyn FnOnce(&World, Timestamp) + Send>;

/// Where a request's answer goes.
pub(crate) type Reply = oneshot::Sender<Result<Outcome, Refusal>>;

/// What the loop is told.
pub(crate) enum Input {
    Request {
        request: Box<Request>,
        reply: Reply,
    },
    Ask(Ask),
    Connect(Connect),
    Report {
        host: HostId,
        session: Uuid,
        sequence: Sequence,
        report: Box<Report>,
    },
    Progress {
        host: HostId,
        session: Uuid,
        report: Box<Report>,
    },
    Gone {
        host: HostId,
        session: Uuid,
        silent: bool,
    },
    /// Something for an agent that no commit covers.
    Send {
        host: HostId,
        down: Down,
        sent: oneshot::Sender<bool>,
    },
}

/// An agent wants a session.
pub(crate) struct Connect {
    pub(crate) host: HostId,
    pub(crate) session: Uuid,
    pub(crate) incarnation: Uuid,
    pub(crate) acknowledged: Sequence,
    pub(crate) epoch: Epoch,
    pub(crate) reply: oneshot::Sender<Result<Connected, Refusal>>,
}

/// How the controller does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Health {
    /// Why nothing can be stored now; `None` when all is well.
    pub read_only: Option<String>,
    /// The loop has ended, or takes nothing more: nothing is answered before the process is started anew.
    pub stopped: bool,
}

/// Why the loop ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It was told to stop.
    Stopped,
    /// Another controller leads now.
    Deposed,
    /// It panicked: a bug. What is stored is whole; start the process anew.
    Failed,
}

/// The loop's own state.
pub(crate) struct Core {
    storage: Arc<dyn Storage>,
    /// `None` while it cannot be read.
    world: Option<World>,
    committed: Arc<Committed>,
    metrics: Arc<Metrics>,
    inputs: mpsc::Receiver<Input>,
    stop: watch::Receiver<bool>,
    health: watch::Sender<Health>,
    clock: Arc<Clock>,
    epoch: Epoch,
    links: Links,
    careful: usize,
    ticked: Instant,
}

/// What is decided and not yet committed.
#[derive(Default)]
struct Batch {
    events: usize,
    effects: Vec<Effect>,
    replies: BTreeMap<RequestId, Reply>,
    /// Hosts that were heard.
    heard: BTreeSet<HostId>,
    connecting: Vec<(Connect, Ends)>,
    sends: Vec<(HostId, Down, oneshot::Sender<bool>)>,
}

/// What [`Core`] is made of.
pub(crate) struct Parts {
    pub(crate) storage: Arc<dyn Storage>,
    pub(crate) committed: Arc<Committed>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) inputs: mpsc::Receiver<Input>,
    pub(crate) stop: watch::Receiver<bool>,
    pub(crate) health: watch::Sender<Health>,
    pub(crate) clock: Arc<Clock>,
}

impl Core {
    pub(crate) async fn load(parts: Parts, stored: Stored) -> Result<Self, engine::LoadError> {
        let mut core = Self {
            storage: parts.storage,
            world: None,
            committed: parts.committed,
            metrics: parts.metrics,
            inputs: parts.inputs,
            stop: parts.stop,
            health: parts.health,
            clock: parts.clock,
            epoch: stored.epoch,
            links: Links::default(),
            careful: 0,
            ticked: Instant::now(),
        };
        core.take_over(stored).await?;
        Ok(core)
    }

    /// Begins anew from what is stored.
    async fn take_over(&mut self, stored: Stored) -> Result<(), engine::LoadError> {
        let Stored { epoch, rows } = stored;
        self.committed.load(&rows);
        // A large world takes seconds: not on this thread.
        let loading = tokio::task::spawn_blocking(move || World::load(rows));
        let mut world = loading.await.expect("loading a world does not panic")?;
        self.epoch = epoch;
        world.set_epoch(epoch);
        world.set_connected(self.links.hosts());
        self.world = Some(world);
        Ok(())
    }

    pub(crate) async fn run(mut self) -> Ended {
        let ended = self.until_its_end().await;
        let reason = match ended {
            Ended::Deposed => "another controller leads now",
            Ended::Stopped | Ended::Failed => "the controller is stopping",
        };
        self.links.close_all(&Refusal::new(Code::Overloaded, reason));
        ended
    }

    async fn until_its_end(&mut self) -> Ended {
        let mut inputs = Vec::with_capacity(BATCH_MAX);
        let mut stopping = false;
        loop {
            let wait = self.until_tick();
            let room = if self.careful > 0 { 1 } else { BATCH_MAX };
            tokio::select! {
                biased;
                _ = self.stop.wait_for(|stop| *stop), if !stopping => {
                    // Nothing more comes in; what waits is still answered.
                    stopping = true;
                    self.inputs.close();
                    continue;
                }
                count = self.inputs.recv_many(&mut inputs, room) => if count == 0 { return Ended::Stopped },
                () = tokio::time::sleep(wait) => {}
            }
            let waiting = i64::try_from(self.inputs.len()).unwrap_or(i64::MAX);
            self.metrics.queue.set(waiting);
            if let Err(StorageError::Deposed) = self.turns(&mut inputs).await {
                return Ended::Deposed;
            }
            let connected = i64::try_from(self.links.count()).unwrap_or(i64::MAX);
            self.metrics.agents.set(connected);
        }
    }

    /// One turn; two while the store's refusals are told apart, so that a tick and an event do not fail together.
    async fn turns(&mut self, inputs: &mut Vec<Input>) -> Result<(), StorageError> {
        let tick = self.until_tick().is_zero();
        if tick && self.careful > 0 && !inputs.is_empty() {
            self.turn(&mut Vec::new(), true).await?;
            return self.turn(inputs, false).await;
        }
        self.turn(inputs, tick).await
    }

    /// Time until the next tick.
    fn until_tick(&self) -> Duration {
        let now = self.clock.now();
        let due = match &self.world {
            Some(_) if self.is_read_only() => TICK,
            Some(world) if world.has_work() => TICK_MIN,
            Some(world) => world
                .next_deadline()
                .map_or(TICK, |at| at.since(now).into())
                .clamp(TICK_MIN, TICK),
            None => TICK,
        };
        due.saturating_sub(self.ticked.elapsed())
    }

    fn is_read_only(&self) -> bool {
        self.health.borrow().read_only.is_some()
    }

    async fn turn(&mut self, inputs: &mut Vec<Input>, tick: bool) -> Result<(), StorageError> {
        let now = self.clock.now();
        self.careful = self.careful.saturating_sub(inputs.len());
        if tick {
            self.ticked = Instant::now();
            if self.is_read_only() {
                self.recover().await?;
            }
        }
        let events = self.answer_reads(inputs, now);
        let writable = if self.is_read_only() { None } else { self.world.take() };
        let Some(mut world) = writable else {
            events.into_iter().for_each(|input| self.refuse(input));
            return Ok(());
        };
        let mut batch = Batch::default();
        for input in events {
            self.decide(&mut world, &mut batch, input, now);
        }
        if tick {
            for host in self.links.lost(&self.committed.hosts_up(), Instant::now()) {
                batch.step(&mut world, Event::Disconnected(host), now);
            }
            batch.step(&mut world, Event::Tick, now);
        }
        match self.commit(&mut batch).await {
            Ok(()) => {
                self.dispatch(&world, batch);
                self.world = Some(world);
                Ok(())
            }
            Err(error) => {
                drop(world);
                self.fail(batch, error).await
            }
        }
    }

    /// Reads are answered between batches: from the committed world.
    fn answer_reads(&self, inputs: &mut Vec<Input>, now: Timestamp) -> Vec<Input> {
        let mut events = Vec::with_capacity(inputs.len());
        for input in inputs.drain(..) {
            match (input, &self.world) {
                (Input::Ask(ask), Some(world)) => ask(world, now),
                // Dropped: the one who asks is told that the store cannot be read.
                (Input::Ask(_), None) => {}
                (event, _) => events.push(event),
            }
        }
        events
    }

    fn decide(&mut self, world: &mut World, batch: &mut Batch, input: Input, now: Timestamp) {
        match input {
            Input::Request { request, reply } => {
                batch.replies.insert(request.id, reply);
                batch.step(world, Event::Request(request), now);
            }
            Input::Connect(connect) => self.connect(world, batch, connect, now),
            Input::Report {
                host,
                session,
                sequence,
                report,
            } => {
                if self.links.hear(host, session, sequence) == Verdict::Take {
                    batch.heard.insert(host);
                    batch.step(world, Event::Report(host, report), now);
                }
            }
            Input::Progress { host, session, report } => {
                if self.links.is_live(host, session) {
                    batch.step(world, Event::Report(host, report), now);
                }
            }
            Input::Gone { host, session, silent } => self.links.gone(host, session, silent, Instant::now()),
            Input::Send { host, down, sent } => batch.sends.push((host, down, sent)),
            Input::Ask(_) => {}
        }
    }

    fn connect(&mut self, world: &mut World, batch: &mut Batch, connect: Connect, now: Timestamp) {
        let host = connect.host;
        let refusal = if world.host(host).is_none() {
            Some(Refusal::new(
                Code::Forbidden,
                format!("host {host} was removed from the cell"),
            ))
        } else if connect.epoch > self.epoch {
            let message = format!(
                "the agent has seen epoch {} and this controller has {}: it is not the leader, or was restored from a backup",
                connect.epoch, self.epoch
            );
            Some(Refusal::new(Code::Stale, message).hint("start the controller that leads"))
        } else {
            None
        };
        if let Some(refusal) = refusal {
            // The agent may have gone.
            let _ = connect.reply.send(Err(refusal));
            return;
        }
        let ends = self
            .links
            .attach(host, connect.session, connect.incarnation, connect.acknowledged);
        batch.heard.insert(host);
        batch.step(world, Event::Connected(host), now);
        batch.connecting.push((connect, ends));
    }

    async fn commit(&mut self, batch: &mut Batch) -> Result<(), StorageError> {
        let changes: Vec<Change> = batch
            .effects
            .iter()
            .filter_map(|effect| match effect {
                Effect::Change(change) => Some(change.as_ref().clone()),
                _ => None,
            })
            .collect();
        if changes.is_empty() {
            return Ok(());
        }
        let started = Instant::now();
        self.storage.commit(changes).await?;
        self.metrics.committed(started.elapsed(), batch.events);
        Ok(())
    }

    /// The batch is committed: everything may leave, in the order in which it was decided.
    fn dispatch(&mut self, world: &World, batch: Batch) {
        let Batch {
            effects,
            mut replies,
            heard,
            connecting,
            sends,
            ..
        } = batch;
        self.committed.apply(effects.iter().filter_map(|effect| match effect {
            Effect::Change(change) => Some(change.as_ref()),
            _ => None,
        }));
        for effect in effects {
            match effect {
                Effect::Change(change) => {
                    if let Change::Delete(Key::Host(host)) = *change {
                        self.links.forget(host);
                    }
                }
                Effect::Send(host, order) => {
                    // A host that is not connected gets it from the outbox when it is.
                    self.links.send(host, Down::Order { order: *order });
                }
                Effect::Reply(request, answer) => {
                    if let Some(reply) = replies.remove(&request) {
                        // The client may have gone.
                        let _ = reply.send(answer.map(|outcome| *outcome).map_err(|refusal| *refusal));
                    }
                }
                Effect::Progress(operation, project, progress) => {
                    self.committed.progress(operation, project, progress);
                }
            }
        }
        self.links.committed(&heard);
        for (connect, ends) in connecting {
            let connected = Connected {
                epoch: self.epoch,
                received: self.links.received(connect.host),
                outbox: world.outbox(connect.host).collect(),
                orders: ends.orders,
                state: ends.state,
            };
            if connect.reply.send(Ok(connected)).is_err() {
                // The agent has gone before anybody read from its session: nobody else will tell.
                self.links.gone(connect.host, connect.session, false, Instant::now());
            }
        }
        for (host, down, sent) in sends {
            let _ = sent.send(self.links.send(host, down));
        }
    }

    /// Nothing of the batch leaves, and the world that it was decided on is gone.
    async fn fail(&mut self, batch: Batch, error: StorageError) -> Result<(), StorageError> {
        self.metrics.commits_failed.inc();
        let story = error.story();
        tracing::error!(
            error = story,
            events = batch.events,
            "a commit failed; its events have had no effect"
        );
        let is_disk = matches!(error, StorageError::Failing(_));
        let refusal = if is_disk {
            read_only(&story)
        } else {
            Refusal::new(Code::Overloaded, format!("the request was not stored: {story}"))
                .hint("try again, with the same idempotency key if it had one")
        };
        for (_, reply) in batch.replies {
            let _ = reply.send(Err(refusal.clone()));
        }
        for (connect, _) in batch.connecting {
            let _ = connect.reply.send(Err(refusal.clone()));
        }
        self.links.failed(&batch.heard, &refusal);
        if matches!(error, StorageError::Deposed) {
            return Err(error);
        }
        self.careful = CAREFUL;
        if is_disk {
            self.become_read_only(story);
        }
        match self.storage.load().await {
            Ok(stored) => self.reload(stored).await,
            Err(StorageError::Deposed) => return Err(StorageError::Deposed),
            Err(error) => self.become_read_only(error.story()),
        }
        Ok(())
    }

    async fn reload(&mut self, stored: Stored) {
        if let Err(error) = self.take_over(stored).await {
            self.become_read_only(error.to_string());
        }
    }

    fn become_read_only(&mut self, story: String) {
        if !self.is_read_only() {
            tracing::error!(reason = story, "read-only: nothing can be stored, VMs run on");
        }
        self.links.close_all(&read_only(&story));
        self.metrics.read_only.set(1);
        self.health.send_replace(Health {
            read_only: Some(story),
            stopped: false,
        });
    }

    /// Tries to write again.
    async fn recover(&mut self) -> Result<(), StorageError> {
        match self.storage.recover().await {
            Ok(stored) => match self.take_over(stored).await {
                Ok(()) => {
                    tracing::info!("the store can be written again");
                    self.metrics.read_only.set(0);
                    self.health.send_replace(Health::default());
                }
                Err(error) => self.become_read_only(error.to_string()),
            },
            Err(StorageError::Deposed) => return Err(StorageError::Deposed),
            Err(error) => tracing::debug!(error = error.story(), "the store cannot be written yet"),
        }
        Ok(())
    }

    /// What cannot be done while nothing can be stored.
    fn refuse(&mut self, input: Input) {
        let story = self.health.borrow().read_only.clone().unwrap_or_default();
        match input {
            Input::Request { reply, .. } => drop(reply.send(Err(read_only(&story)))),
            Input::Connect(connect) => drop(connect.reply.send(Err(read_only(&story)))),
            Input::Gone { host, session, silent } => self.links.gone(host, session, silent, Instant::now()),
            // Their sessions are closed; agents keep their reports and send them again.
            Input::Report { .. } | Input::Progress { .. } | Input::Send { .. } | Input::Ask(_) => {}
        }
    }
}

impl Batch {
    fn step(&mut self, world: &mut World, event: Event, now: Timestamp) {
        self.events += 1;
        self.effects.extend(engine::step(world, event, now));
    }
}

/// The refusal while nothing can be stored.
pub(crate) fn read_only(story: &str) -> Refusal {
    Refusal::new(Code::ReadOnly, format!("nothing can be stored now: {story}"))
        .hint("free space on the controller's disk; it goes on by itself")
}

/// Whether a row has to be there before the loop can start.
pub(crate) fn is_first_start(rows: &[Row]) -> bool {
    !rows.iter().any(|row| matches!(row, Row::Project(_)))
}
