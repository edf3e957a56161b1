//! One task owns a VM's process: it carries out actions over QMP and tells what happened.
//!
//! ```text
//!             ┌──────────── carries out ◀── Action
//!             ▼
//!   QEMU ── events, answers ──▶ Happened
//!     └──── pidfd ────────────▶ Died, once, last
//! ```

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use driver::{Action, Condition, CopyLimits, Happened, INCOMING_SOCKET, OUTGOING_SOCKET};
use model::VmId;
use model::telemetry::DiskFigures;
use qmp::{
    CapabilityState, CommandError, Event, EventKind, Events, GetFd, MigrationStatus, RunState, Session, ShutdownCause,
};
use tokio::io::unix::AsyncFd;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};

use crate::copy::{Copy, outcome};
use crate::launch::{DirectoryPath, Driven, attach, listen_in};
use crate::process::Held;

/// Between two looks at a copy, which also come when QEMU tells of a round.
const LOOK: Duration = Duration::from_millis(25);
/// Between two attempts to get a lost monitor back.
const REATTACH: Duration = Duration::from_secs(1);
/// A cancelled copy that has not ended by then waits for its connection: that is cut.
const CANCEL_GRACE: Duration = Duration::from_secs(1);
/// How long a dead QEMU's last events are waited for.
const LAST_EVENTS: Duration = Duration::from_secs(1);
/// Names of the passed streams inside QEMU.
const INCOMING: &str = "incoming";
const OUTGOING: &str = "outgoing";

/// Sent again at 0, 50, 150, 300 and 500 ms.
const ANNOUNCE: qmp::AnnounceSelf = qmp::AnnounceSelf {
    initial: 50,
    max: 550,
    rounds: 5,
    step: 50,
};

/// What the agent asks.
pub(crate) struct Asks {
    pub(crate) actions: mpsc::Receiver<Action>,
    pub(crate) figures: mpsc::Receiver<oneshot::Sender<DiskFigures>>,
}

pub(crate) struct Monitor {
    held: Held,
    /// `None` while the monitor is lost though the process lives.
    link: Option<(Session, Events)>,
    run_dir: PathBuf,
    vm: VmId,
    asks: Asks,
    happened: mpsc::Sender<Happened>,
    /// The guest's CPUs run, by QEMU's events.
    running: bool,
    /// The state has yet to come.
    loading: bool,
    incoming: Option<UnixListener>,
    copy: Option<Copy>,
}

/// The first emulating QEMU that was seen to send all that a running guest writes.
const SEES_WRITES: qmp::VersionTriple = qmp::VersionTriple {
    major: 10,
    minor: 0,
    micro: 0,
};

/// The agent lets go of the VM: nobody hears any more.
struct LetGo;

/// What the loop woke up for.
enum Wake {
    Died,
    Event(Option<Event>),
    Action(Option<Action>),
    Incoming(io::Result<UnixStream>),
    Figures(oneshot::Sender<DiskFigures>),
    Look,
    Reattach,
}

impl Monitor {
    pub(crate) fn new(driven: Driven, run_dir: &Path, vm: VmId, asks: Asks, happened: mpsc::Sender<Happened>) -> Self {
        let Driven { held, session, events } = driven;
        Self {
            held,
            link: Some((session, events)),
            run_dir: run_dir.to_owned(),
            vm,
            asks,
            happened,
            running: false,
            loading: false,
            incoming: None,
            copy: None,
        }
    }

    /// Until the process is dead, or the agent lets go of it.
    pub(crate) async fn run(mut self) {
        let exit = match self.held.pinned.watch() {
            Ok(exit) => exit,
            Err(error) => return tracing::error!(%error, "cannot watch QEMU's process"),
        };
        if self.up().await.is_err() {
            return;
        }
        loop {
            let going_on = match self.wake(&exit).await {
                Wake::Died => return self.died().await,
                Wake::Event(Some(event)) => self.event(event).await.map(drop),
                Wake::Event(None) => self.lost().await,
                Wake::Action(Some(action)) => self.act(action).await,
                Wake::Action(None) => return,
                Wake::Incoming(stream) => self.incoming(stream).await,
                Wake::Figures(reply) => {
                    self.figures(reply).await;
                    Ok(())
                }
                Wake::Look => self.look().await,
                Wake::Reattach => self.reattach().await,
            };
            if going_on.is_err() {
                return;
            }
        }
    }

    async fn wake(&mut self, exit: &AsyncFd<Arc<OwnedFd>>) -> Wake {
        let (copying, linked) = (self.copy.is_some(), self.link.is_some());
        let events = async {
            match &mut self.link {
                Some((_, events)) => events.recv().await,
                None => std::future::pending().await,
            }
        };
        let incoming = async {
            match &self.incoming {
                Some(listener) => listener.accept().await.map(|(stream, _)| stream),
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            event = events => Wake::Event(event),
            _ = exit.readable() => Wake::Died,
            () = self.happened.closed() => Wake::Action(None),
            action = self.asks.actions.recv() => Wake::Action(action),
            stream = incoming => Wake::Incoming(stream),
            Some(reply) = self.asks.figures.recv() => Wake::Figures(reply),
            () = tokio::time::sleep(LOOK), if copying && linked => Wake::Look,
            () = tokio::time::sleep(REATTACH), if !linked => Wake::Reattach,
        }
    }

    async fn tell(&self, happened: Happened) -> Result<(), LetGo> {
        self.happened.send(happened).await.map_err(|_| LetGo)
    }

    async fn up(&mut self) -> Result<(), LetGo> {
        let condition = match self.ask(qmp::QueryStatus {}).await {
            Ok(status) => condition(&status.status),
            // It answered a moment ago: what happens next tells more.
            Err(_) => Condition::Ended,
        };
        self.running = condition == Condition::Running;
        self.loading = condition == Condition::Loading;
        self.tell(Happened::Up { condition }).await
    }

    /// Runs a command; a lost monitor is a refusal.
    async fn ask<C: qmp::Command>(&self, command: C) -> Result<C::Return, String> {
        match &self.link {
            Some((session, _)) => session.execute(command).await.map_err(|error| error.to_string()),
            None => Err("QEMU's monitor is lost".to_owned()),
        }
    }

    /// Counts what the guest read and wrote. Not while it is moved: QEMU takes commands byte by byte in its main loop, which has better to
    /// do then.
    async fn figures(&self, reply: oneshot::Sender<DiskFigures>) {
        if self.copy.is_some() || self.loading {
            return;
        }
        if let Ok(devices) = self.ask(qmp::QueryBlockstats {}).await {
            let mut all = DiskFigures::default();
            for device in devices {
                all.read_bytes = all.read_bytes.saturating_add(device.stats.rd_bytes);
                all.written_bytes = all.written_bytes.saturating_add(device.stats.wr_bytes);
                all.reads = all.reads.saturating_add(device.stats.rd_operations);
                all.writes = all.writes.saturating_add(device.stats.wr_operations);
            }
            // Who asked may have gone.
            let _ = reply.send(all);
        }
    }

    async fn act(&mut self, action: Action) -> Result<(), LetGo> {
        let name = action_name(&action);
        let done = match action {
            Action::Run => self.run_guest().await,
            Action::Stand => self.stand().await,
            Action::PowerButton => self.ask(qmp::SystemPowerdown {}).await.map(|_| Ok(())),
            Action::Reset => self.reset().await,
            Action::Kill => self
                .held
                .pinned
                .kill()
                .map(|()| Ok(()))
                .map_err(|error| error.to_string()),
            Action::Listen => self.listen().await,
            Action::Copy(limits) => Ok(self.start_copy(limits).await),
            Action::Attend => self.attend().await,
            Action::CancelCopy => self.cancel_copy().await,
            Action::Announce => self.ask(ANNOUNCE).await.map(|_| Ok(())),
        };
        match done {
            Ok(told) => told,
            Err(reason) => self.tell(Happened::Refused { action: name, reason }).await,
        }
    }

    async fn run_guest(&mut self) -> Result<Result<(), LetGo>, String> {
        // QEMU would take it for "run as soon as the state is here", before anyone decided that it may.
        if self.loading {
            return Err("the state is not here yet".to_owned());
        }
        let ran = self.running;
        self.ask(qmp::Cont {}).await?;
        if self
            .heard(|kind| matches!(kind, EventKind::Resume))
            .await
            .is_ok_and(|heard| !heard)
            && ran
        {
            return Ok(self.tell(Happened::Running { at_ms: now_ms() }).await);
        }
        Ok(Ok(()))
    }

    async fn stand(&mut self) -> Result<Result<(), LetGo>, String> {
        self.ask(qmp::Stop {}).await?;
        match self.heard(|kind| matches!(kind, EventKind::Stop)).await {
            Ok(false) => Ok(self.standing(now_ms()).await),
            Ok(true) => Ok(Ok(())),
            Err(gone) => Ok(Err(gone)),
        }
    }

    async fn reset(&mut self) -> Result<Result<(), LetGo>, String> {
        self.ask(qmp::SystemReset {}).await?;
        match self.heard(|kind| matches!(kind, EventKind::Reset { .. })).await {
            Ok(false) => Ok(self.tell(Happened::Reset).await),
            Ok(true) => Ok(Ok(())),
            Err(gone) => Ok(Err(gone)),
        }
    }

    /// Tells of all events that came before the last answer, and whether one was of this kind.
    async fn heard(&mut self, wanted: fn(&EventKind) -> bool) -> Result<bool, LetGo> {
        let mut heard = false;
        while let Some(event) = self.link.as_mut().and_then(|(_, events)| events.try_recv()) {
            heard |= wanted(&event.kind);
            self.event(event).await?;
        }
        Ok(heard)
    }

    /// The guest stands. Whether it will stay so is QEMU's status, not the event: see `finish-migrate`.
    async fn standing(&mut self, at_ms: i64) -> Result<(), LetGo> {
        self.running = false;
        let settled = match self.ask(qmp::QueryStatus {}).await {
            Ok(status) => !matches!(status.status, RunState::FinishMigrate) && !status.running,
            Err(_) => false,
        };
        self.tell(Happened::Standing { at_ms, settled }).await
    }

    async fn event(&mut self, event: Event) -> Result<(), LetGo> {
        let at_ms = i64::try_from(event.at_us / 1000).unwrap_or(i64::MAX);
        match event.kind {
            EventKind::Resume => {
                self.running = true;
                self.tell(Happened::Running { at_ms }).await
            }
            EventKind::Stop => self.standing(at_ms).await,
            EventKind::Reset { .. } => self.tell(Happened::Reset).await,
            EventKind::Shutdown {
                guest: true,
                reason: ShutdownCause::GuestShutdown,
            } => self.tell(Happened::PoweredOff).await,
            EventKind::Migration { status } => self.migration(&status).await,
            EventKind::MigrationPass { .. } if self.copy.is_some() => self.look().await,
            EventKind::BlockIoError {
                node_name,
                operation,
                action,
                reason,
            } => {
                tracing::warn!(vm = %self.vm, node_name, operation, action, reason, "a disk request failed");
                Ok(())
            }
            _ => Ok(()),
        }
    }

    async fn migration(&mut self, status: &MigrationStatus) -> Result<(), LetGo> {
        if self.copy.is_some() {
            return if status.is_over() { self.look().await } else { Ok(()) };
        }
        match status {
            MigrationStatus::Completed if self.loading => {
                self.loading = false;
                self.tell(Happened::Loaded).await
            }
            MigrationStatus::Failed if self.loading => {
                let said = self
                    .ask(qmp::QueryMigrate {})
                    .await
                    .ok()
                    .and_then(|info| info.error_desc);
                let reason = said.unwrap_or_else(|| "QEMU gives no reason".to_owned());
                self.tell(Happened::LoadFailed { reason }).await
            }
            _ => Ok(()),
        }
    }

    // --- destination

    async fn listen(&mut self) -> Result<Result<(), LetGo>, String> {
        // QEMU announces at the end of the load, though the guest does not run here yet and perhaps never will.
        let parameters = qmp::MigrateSetParameters {
            announce_rounds: Some(0),
            ..Default::default()
        };
        self.prepare_migration(parameters).await?;
        let listener = listen_in(&self.run_dir, INCOMING_SOCKET).map_err(|error| format!("cannot listen: {error}"))?;
        listener.set_nonblocking(true).map_err(|error| error.to_string())?;
        self.incoming = Some(UnixListener::from_std(listener).map_err(|error| error.to_string())?);
        Ok(self.tell(Happened::Listening).await)
    }

    /// The one expected stream is here: no other is let in.
    async fn incoming(&mut self, stream: io::Result<UnixStream>) -> Result<(), LetGo> {
        self.incoming = None;
        // It was made for one stream; the next process makes its own.
        let _ = std::fs::remove_file(self.run_dir.join(INCOMING_SOCKET));
        let taken = match stream.and_then(UnixStream::into_std) {
            Ok(stream) => self.load_from(stream.into()).await,
            Err(error) => Err(format!("the stream cannot be taken: {error}")),
        };
        match taken {
            Ok(()) => Ok(()),
            Err(reason) => self.tell(Happened::LoadFailed { reason }).await,
        }
    }

    async fn load_from(&self, stream: OwnedFd) -> Result<(), String> {
        self.ask(GetFd::new(INCOMING, stream)).await?;
        let uri = format!("fd:{INCOMING}");
        let Some((session, _)) = &self.link else {
            return Err("QEMU's monitor is lost".to_owned());
        };
        // A QEMU that stays after a failed load can say why. Older ones do not know the word, and end.
        let staying = qmp::MigrateIncoming {
            uri: uri.clone(),
            exit_on_error: Some(false),
        };
        match session.execute(staying).await {
            Ok(_) => Ok(()),
            Err(CommandError::Refused { desc, .. }) if desc.contains("exit-on-error") => self
                .ask(qmp::MigrateIncoming {
                    uri,
                    exit_on_error: None,
                })
                .await
                .map(drop),
            Err(error) => Err(error.to_string()),
        }
    }

    // --- source

    async fn prepare_migration(&self, parameters: qmp::MigrateSetParameters) -> Result<(), String> {
        let on = |capability: &str| CapabilityState {
            capability: capability.to_owned(),
            state: true,
        };
        let capabilities = ["return-path", "events", "late-block-activate"].map(on).to_vec();
        self.ask(qmp::MigrateSetCapabilities { capabilities }).await?;
        self.ask(parameters).await.map(drop)
    }

    async fn start_copy(&mut self, limits: CopyLimits) -> Result<(), LetGo> {
        if self.copy.is_some() {
            return self
                .tell(Happened::Refused {
                    action: "copy",
                    reason: "a copy is under way".to_owned(),
                })
                .await;
        }
        self.held.turn_page();
        match self.sees_all_writes().await {
            Ok(true) => {}
            Ok(false) => match self.stand().await {
                Ok(told) => told?,
                Err(reason) => return self.tell(Happened::CopyFailed { reason }).await,
            },
            Err(reason) => return self.tell(Happened::CopyFailed { reason }).await,
        }
        match self.copy_to_socket(limits).await {
            Ok(()) => {
                self.copy = Some(Copy::begin(Instant::now()));
                Ok(())
            }
            Err(reason) => self.tell(Happened::CopyFailed { reason }).await,
        }
    }

    /// Whether what a running guest writes is sent again. An emulating QEMU before [`SEES_WRITES`] clears its record of written pages
    /// without making the next write to them visible, and loses some: seen on 7.2 as guests that panic after a move under load. There the
    /// guest stands for the whole copy.
    async fn sees_all_writes(&self) -> Result<bool, String> {
        let Some((session, _)) = &self.link else {
            return Err("QEMU's monitor is lost".to_owned());
        };
        if session.version().qemu >= SEES_WRITES {
            return Ok(true);
        }
        Ok(self.ask(qmp::QueryKvm {}).await?.enabled)
    }

    async fn copy_to_socket(&self, limits: CopyLimits) -> Result<(), String> {
        let parameters = qmp::MigrateSetParameters {
            max_bandwidth: Some(limits.bytes_per_s_max.unwrap_or(0)),
            downtime_limit: Some(limits.downtime_max.0),
            ..Default::default()
        };
        self.prepare_migration(parameters).await?;
        let connect = async {
            let directory = DirectoryPath::open(&self.run_dir)?;
            UnixStream::connect(directory.join(OUTGOING_SOCKET)).await?.into_std()
        };
        let stream = connect
            .await
            .map_err(|error| format!("no tunnel at {OUTGOING_SOCKET}: {error}"))?;
        self.ask(GetFd::new(OUTGOING, stream.into())).await?;
        self.ask(qmp::Migrate {
            uri: format!("fd:{OUTGOING}"),
            resume: false,
        })
        .await
        .map(drop)
    }

    async fn attend(&mut self) -> Result<Result<(), LetGo>, String> {
        let info = self.ask(qmp::QueryMigrate {}).await?;
        // Without a copy ever begun the status is empty, and `look` would wait for one.
        if info.status == MigrationStatus::default() || info.status.is_over() {
            return Ok(self.tell(outcome(&info)).await);
        }
        self.copy = Some(Copy::attend(&info, Instant::now()));
        Ok(self.look().await)
    }

    async fn cancel_copy(&mut self) -> Result<Result<(), LetGo>, String> {
        if self.copy.is_none() {
            let info = self.ask(qmp::QueryMigrate {}).await?;
            if info.status == MigrationStatus::default() || info.status.is_over() {
                return Ok(self.tell(outcome(&info)).await);
            }
        }
        // One that nobody here has attended to yet is given up like any other: until it has ended, nobody may say that it has.
        let copy = self.copy.get_or_insert_with(|| Copy::begin(Instant::now()));
        copy.cancelled.get_or_insert_with(Instant::now);
        self.ask(qmp::MigrateCancel {}).await?;
        Ok(self.look().await)
    }

    /// Tells how far the copy is.
    async fn look(&mut self) -> Result<(), LetGo> {
        let Ok(info) = self.ask(qmp::QueryMigrate {}).await else {
            return Ok(());
        };
        let Some(copy) = &mut self.copy else { return Ok(()) };
        let (told, over) = copy.seen(&info, Instant::now());
        let stuck = copy.cancelled.is_some_and(|since| since.elapsed() > CANCEL_GRACE);
        if over {
            self.copy = None;
        } else if stuck && let Some(copy) = &mut self.copy {
            copy.cancelled = Some(Instant::now());
            let yanked = self
                .ask(qmp::Yank {
                    instances: vec![qmp::YankInstance::Migration],
                })
                .await;
            tracing::warn!(vm = %self.vm, ?yanked, "a cancelled copy hangs: its connection is cut");
        }
        for happened in told {
            match happened {
                // Figures for a reader who is slow are of no use; the next ones are better.
                Happened::Copying(state) if state.ended.is_none() => drop(self.happened.try_send(happened)),
                _ => self.tell(happened).await?,
            }
        }
        Ok(())
    }

    // --- ends

    /// The monitor closed: QEMU is ending, or it was too much for the session.
    async fn lost(&mut self) -> Result<(), LetGo> {
        if let Some((session, _)) = self.link.take() {
            let reason = session.closed().await;
            tracing::debug!(vm = %self.vm, %reason, "QEMU's monitor closed");
        }
        Ok(())
    }

    /// What happened meanwhile is unknown: ask, and tell what is.
    async fn reattach(&mut self) -> Result<(), LetGo> {
        match attach(&self.run_dir, self.vm, REATTACH).await {
            Ok(link) => self.link = Some(link),
            Err(error) => {
                tracing::warn!(vm = %self.vm, %error, "QEMU's monitor does not answer");
                return Ok(());
            }
        }
        let Ok(status) = self.ask(qmp::QueryStatus {}).await else {
            return Ok(());
        };
        if std::mem::replace(&mut self.loading, status.status == RunState::InMigrate) && !self.loading {
            self.tell(Happened::Loaded).await?;
        }
        match (self.running, status.running) {
            (false, true) => {
                self.running = true;
                self.tell(Happened::Running { at_ms: now_ms() }).await?;
            }
            // Also one that stood before: it may have been told to run just when the monitor was lost.
            (_, false) if !self.loading => self.standing(now_ms()).await?,
            _ => {}
        }
        self.look().await
    }

    async fn died(&mut self) {
        // Its last events are on their way: a guest that powered itself off is not one whose QEMU crashed.
        let last = async {
            while let Some(event) = match &mut self.link {
                Some((_, events)) => events.recv().await,
                None => None,
            } {
                if self.event(event).await.is_err() {
                    return;
                }
            }
        };
        let _ = tokio::time::timeout(LAST_EVENTS, last).await;
        let detail = self.held.obituary();
        // Nobody left to tell is no failure.
        let _ = self.tell(Happened::Died { detail }).await;
    }
}

fn condition(status: &RunState) -> Condition {
    match status {
        RunState::Running => Condition::Running,
        RunState::InMigrate => Condition::Loading,
        RunState::PostMigrate => Condition::Sent,
        RunState::Shutdown | RunState::InternalError | RunState::GuestPanicked => Condition::Ended,
        _ => Condition::Standing,
    }
}

fn action_name(action: &Action) -> &'static str {
    match action {
        Action::Run => "run",
        Action::Stand => "stand",
        Action::PowerButton => "power button",
        Action::Reset => "reset",
        Action::Kill => "kill",
        Action::Listen => "listen",
        Action::Copy(_) => "copy",
        Action::Attend => "attend",
        Action::CancelCopy => "cancel of the copy",
        Action::Announce => "announce",
    }
}

fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}
