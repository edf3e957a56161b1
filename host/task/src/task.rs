//! The task: which input goes where, and how orders are accepted.

use driver::{Action, Condition, Happened, Launch, Mode};
use handover::{Destination, Source};
use model::{
    BootId, Code, Generation, HostId, Message, OperationId, Refusal, Revision, VmId,
    order::{Happening, OffCause, Verb, VmObserved, VmOrder, VmReport},
    vm::Power,
};

use crate::{
    effect::{Effect, Input, Peer, Timer, TunnelEvent},
    moving::Move,
    saved::{Pending, Role, Saved},
};

/// Most inputs that wait while a restarted agent looks for the process.
const DEFERRED_MAX: usize = 64;

/// One VM on one host.
#[derive(Clone, Debug)]
pub struct Task {
    pub(crate) host: HostId,
    pub(crate) boot: BootId,
    pub(crate) saved: Saved,
    /// What its process does; `None` when there is none.
    pub(crate) up: Option<Condition>,
    /// A process is being prepared or started; it will be there, or not.
    pub(crate) building: bool,
    /// The guest powered itself off; its process is about to end.
    pub(crate) powered_off: bool,
    /// Why the start that is under way was refused, until the process is dead.
    pub(crate) start_refused: Option<Refusal>,
    /// The agent restarted, or lost the process, and looks for it.
    pub(crate) recovering: bool,
    /// How often this process was told to end.
    pub(crate) kills: u32,
    /// What came meanwhile: nothing is decided before it is known whether there is a process.
    pub(crate) deferred: Vec<Input>,
    /// What a hand-over needs besides its journalled state.
    pub(crate) moving: Move,
}

impl Task {
    /// A VM of which nothing is known here yet.
    #[must_use]
    pub fn new(vm: VmId, host: HostId, boot: BootId) -> Self {
        Self::with(Saved::new(vm, boot), host, boot)
    }

    pub(crate) fn with(saved: Saved, host: HostId, boot: BootId) -> Self {
        Self {
            host,
            boot,
            saved,
            up: None,
            building: false,
            powered_off: false,
            start_refused: None,
            recovering: false,
            kills: 0,
            deferred: vec![],
            moving: Move::default(),
        }
    }

    /// What the journal keeps: written at each [`Effect::Save`].
    #[must_use]
    pub const fn saved(&self) -> &Saved {
        &self.saved
    }

    /// Whether nothing of the VM is here: only a tombstone is kept.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.saved.role == Role::None && self.saved.pending.is_none() && self.up.is_none()
    }

    /// Whether what is being built is not wanted any more: there is no point in fetching anything for it.
    #[must_use]
    pub fn is_given_up(&self) -> bool {
        let ends = matches!(self.saved.pending, Some(Pending::End { .. } | Pending::Remove { .. }));
        let declined =
            matches!(&self.saved.role, Role::Destination { state, .. } if matches!(state, Destination::Void { .. }));
        ends || declined
    }

    /// The VM as the inventory tells it.
    #[must_use]
    pub fn observed(&self) -> VmObserved {
        let what = match (&self.saved.role, self.up) {
            (Role::None, None) => match &self.saved.answer {
                Some(last @ (Happening::TornDown { .. } | Happening::Voided { .. } | Happening::Removed)) => {
                    last.clone()
                }
                _ => Happening::Removed,
            },
            (Role::Source { .. } | Role::Destination { .. }, _) => self.observed_moving(),
            // Not known yet: as it was when the last agent knew it.
            (_, None) if self.recovering && self.saved.power == Power::On => Happening::Running,
            (_, None) if self.recovering && self.saved.power == Power::Paused => Happening::Paused,
            // It was there when it was told to end, or the order would be answered.
            (Role::Holder, None) if self.recovering && matches!(self.saved.pending, Some(Pending::End { .. })) => {
                Happening::Running
            }
            (_, Some(Condition::Running)) => Happening::Running,
            (_, Some(_)) => Happening::Paused,
            (_, None) => match &self.saved.answer {
                Some(off @ Happening::Off { .. }) => off.clone(),
                _ => Happening::Off {
                    cause: OffCause::Ordered,
                },
            },
        };
        // A start that is under way is off by an earlier order, not by this one.
        let starting = self.up.is_none() && !self.recovering && self.saved.pending == Some(Pending::Start);
        let revision = Revision(self.saved.revision.0.saturating_sub(u64::from(starting)));
        VmObserved {
            vm: self.saved.vm,
            generation: self.saved.generation,
            revision,
            what,
        }
    }

    /// Takes what happened and returns what to do, in order.
    pub fn step(&mut self, input: Input) -> Vec<Effect> {
        let tells = matches!(
            input,
            Input::Lost | Input::Driver(Happened::Up { .. } | Happened::NotUp { .. })
        );
        if let Input::PeerLink { up } = input {
            return self.peer_link(up);
        }
        if self.recovering && !tells {
            // What does not fit comes again: orders on the next connection, words by their timers. What is repeated counts once, and what
            // the process said before says nothing: it is asked.
            let old = matches!(input, Input::Driver(_)) || self.deferred.contains(&input);
            if self.deferred.len() < DEFERRED_MAX && !old {
                self.deferred.push(input);
            }
            return vec![];
        }
        let mut effects = self.take(input);
        if !self.recovering {
            for input in std::mem::take(&mut self.deferred) {
                effects.extend(self.take(input));
            }
        }
        if effects.contains(&Effect::Act(Action::Kill)) {
            self.kills = self.kills.saturating_add(1);
        }
        effects
    }

    fn take(&mut self, input: Input) -> Vec<Effect> {
        match input {
            Input::Order(order) => self.order(*order),
            // Nobody waits for it.
            Input::Prepared(_) if !self.building => vec![],
            Input::Prepared(Ok(launch)) => self.prepared(launch),
            Input::Prepared(Err(reason)) => {
                self.building = false;
                self.not_prepared(reason)
            }
            Input::Driver(happened) => self.driver(happened),
            Input::Lost => self.lost(),
            Input::Tunnel(event) => self.tunnel(event),
            Input::PeerLink { up } => self.peer_link(up),
            Input::Peer(peer) => self.peer(peer),
            Input::Timer(timer) => self.timer(timer),
            Input::FilesDeleted(result) => self.files_deleted(result),
        }
    }

    fn order(&mut self, order: VmOrder) -> Vec<Effect> {
        if order.epoch < self.saved.epoch {
            return vec![];
        }
        self.saved.epoch = order.epoch;
        if order.revision <= self.saved.revision {
            // Told already; the answer may have been lost, or is still to come.
            return self
                .saved
                .answer
                .clone()
                .map(|answer| self.report(answer))
                .into_iter()
                .collect();
        }
        if let Some(reason) = self.why_not(&order) {
            self.saved.refused = self.saved.refused.max(order.revision);
            return vec![self.save(), self.report_for(&order, Happening::Refused { reason })];
        }
        self.saved.revision = order.revision;
        self.saved.generation = order.generation;
        self.saved.operation = Some(order.operation);
        self.saved.answer = None;
        match order.verb {
            // Its seed is not the task's: it would go into the journal.
            Verb::Start { definition, paused, .. } => self.start(definition, paused),
            Verb::Stop { grace } => self.stop(grace),
            Verb::Kill => self.kill(),
            Verb::Reboot => self.reboot(),
            Verb::Pause => self.pause(),
            Verb::Resume => self.resume(),
            Verb::Remove { volumes } => self.remove(volumes),
            Verb::Receive { terms, definition } => self.receive(terms, definition),
            Verb::Send { terms, to } => self.send(terms, to),
            Verb::Cancel { terms } => self.cancel(&terms),
        }
    }

    /// Why an order cannot be accepted now, if it cannot.
    pub(crate) fn why_not(&self, order: &VmOrder) -> Option<Refusal> {
        if order.generation < self.saved.generation {
            let text = format!(
                "{} of VM {} is for generation {}, but this host knows generation {}",
                order.verb.name(),
                order.vm,
                order.generation,
                self.saved.generation
            );
            return Some(Refusal::new(Code::Stale, text));
        }
        if order.revision <= self.saved.refused {
            let text = format!("{} of VM {} was refused already", order.verb.name(), order.vm);
            return Some(Refusal::new(Code::Stale, text));
        }
        // A hand-over that nobody can tell the end of bars nothing: the controller orders only once both hosts are clear of it.
        let ends = matches!(order.verb, Verb::Kill | Verb::Remove { .. });
        let moving = self.is_moving() && !self.is_unknown() && !self.may_end_moving(order);
        let cancels = matches!(order.verb, Verb::Cancel { .. });
        let doing = match &self.saved.pending {
            _ if cancels => None,
            _ if moving => Some("it is being moved"),
            Some(_) if ends => None,
            Some(Pending::Start) => Some("it is being started"),
            Some(Pending::End { .. } | Pending::Remove { .. }) => Some("it is being ended"),
            Some(Pending::Pause | Pending::Resume | Pending::Reboot) => Some("another order is being carried out"),
            None => None,
        };
        doing.map(|doing| {
            Refusal::new(
                Code::Busy,
                format!("VM {} cannot {} now: {doing}", order.vm, order.verb.name()),
            )
        })
    }

    fn driver(&mut self, happened: Happened) -> Vec<Effect> {
        match happened {
            Happened::Up { condition } => {
                self.up = Some(condition);
                self.building = false;
                self.kills = 0;
                if std::mem::take(&mut self.recovering) {
                    self.found(condition)
                } else {
                    self.spawned()
                }
            }
            Happened::NotUp { reason } => {
                self.up = None;
                self.building = false;
                if std::mem::take(&mut self.recovering) {
                    self.not_found(&reason)
                } else {
                    self.not_spawned(reason)
                }
            }
            Happened::Running { at_ms } => {
                self.up = Some(Condition::Running);
                self.running(at_ms)
            }
            Happened::Standing { at_ms, settled } => {
                self.up = Some(Condition::Standing);
                self.standing(at_ms, settled)
            }
            Happened::Reset => match self.saved.pending {
                Some(Pending::Reboot) => self.answer(Happening::Rebooted),
                _ => vec![],
            },
            Happened::PoweredOff => {
                self.powered_off = true;
                vec![]
            }
            Happened::Died { detail } => {
                self.up = None;
                self.died(detail)
            }
            Happened::Refused { action, reason } => self.refused(action, &reason),
            Happened::Listening
            | Happened::Copying(_)
            | Happened::Copied { .. }
            | Happened::CopyFailed { .. }
            | Happened::Loaded
            | Happened::LoadFailed { .. } => self.moved(happened),
        }
    }

    /// Whether what is being prepared or started is still wanted.
    fn is_wanted(&self) -> bool {
        match &self.saved.role {
            Role::Destination { state, .. } => matches!(state, Destination::Waiting(_)),
            _ => self.saved.pending == Some(Pending::Start),
        }
    }

    fn prepared(&mut self, launch: Box<Launch>) -> Vec<Effect> {
        if self.is_wanted() {
            return vec![Effect::Spawn(launch)];
        }
        self.building = false;
        self.died("it was given up before it was started".to_owned())
    }

    fn spawned(&mut self) -> Vec<Effect> {
        match self.saved.role {
            _ if !self.is_wanted() => vec![Effect::Act(Action::Kill)],
            Role::Destination { .. } => vec![Effect::Act(Action::Listen)],
            _ => self.started(),
        }
    }

    /// Goes on after the agent restarted. `saved` is the journal's last record of this VM, `boot` the host's boot now.
    #[must_use]
    pub fn recover(saved: Saved, host: HostId, boot: BootId) -> (Self, Vec<Effect>) {
        let same_boot = saved.boot == boot;
        let mut task = Self::with(saved, host, boot);
        task.saved.boot = boot;
        if task.saved.role == Role::None && task.saved.pending.is_none() {
            // The last agent may have died between its last record and clearing away.
            let effects = if same_boot { vec![Effect::Clear] } else { vec![] };
            return (task, effects);
        }
        if !same_boot {
            let effects = task.rebooted();
            return (task, effects);
        }
        task.recovering = true;
        let mut effects = vec![Effect::Adopt];
        if task.is_moving() {
            effects.push(Effect::Tunnel(crate::effect::Tunnel::Adopt));
        }
        effects.extend(task.deadline_of_search());
        (task, effects)
    }

    pub(crate) const fn is_moving(&self) -> bool {
        matches!(self.saved.role, Role::Source { .. } | Role::Destination { .. })
    }

    /// Whether an order may end the VM here though it is being moved. What was not released is the source's alone: once it is ended
    /// here no destination can run it. What was released may be cleared away when the order is above all generations of the terms:
    /// the hand-over, of which we wait to hear, is over, and to end one's own standing copy is always safe.
    fn may_end_moving(&self, order: &VmOrder) -> bool {
        match (&self.saved.role, &order.verb) {
            (
                Role::Source {
                    state: Source::Copying { .. },
                    ..
                },
                Verb::Kill,
            ) => true,
            (
                Role::Source {
                    terms,
                    state: Source::Released,
                    ..
                },
                Verb::Kill | Verb::Remove { .. },
            ) => order.generation > terms.reclaimed,
            _ => false,
        }
    }

    /// Whether this host rebooted during a hand-over and cannot tell who has the VM.
    pub(crate) const fn is_unknown(&self) -> bool {
        matches!(
            self.saved.role,
            Role::Source {
                state: Source::Unknown,
                ..
            } | Role::Destination {
                state: Destination::Unknown,
                ..
            }
        )
    }

    /// Writes down how it is now: later changes of the same step are in later records.
    pub(crate) fn save(&self) -> Effect {
        Effect::Save(Box::new(self.saved.clone()))
    }

    /// The order is carried out: remember the answer, and give it.
    pub(crate) fn answer(&mut self, what: Happening) -> Vec<Effect> {
        self.saved.pending = None;
        self.saved.answer = Some(what.clone());
        vec![self.save(), self.report(what)]
    }

    /// The order cannot be carried out.
    pub(crate) fn answer_refused(&mut self, reason: Refusal) -> Vec<Effect> {
        self.answer(Happening::Refused { reason })
    }

    /// Tells what happened, on behalf of the last order.
    pub(crate) fn report(&self, what: Happening) -> Effect {
        self.report_as(self.saved.generation, self.saved.revision, self.saved.operation, what)
    }

    fn report_for(&self, order: &VmOrder, what: Happening) -> Effect {
        self.report_as(order.generation, order.revision, Some(order.operation), what)
    }

    fn report_as(
        &self,
        generation: Generation,
        revision: Revision,
        operation: Option<OperationId>,
        what: Happening,
    ) -> Effect {
        Effect::Report(Box::new(VmReport {
            vm: self.saved.vm,
            generation,
            revision,
            operation,
            what,
        }))
    }

    /// Asks for what the hypervisor needs to start.
    pub(crate) fn prepare(&mut self, mode: Mode) -> Effect {
        self.building = true;
        match &self.saved.definition {
            Some(definition) => Effect::Prepare {
                definition: definition.clone(),
                mode,
            },
            // Every order that leads here brought one.
            None => Effect::Clear,
        }
    }

    fn timer(&mut self, timer: Timer) -> Vec<Effect> {
        match timer {
            Timer::Grace => self.grace_over(),
            Timer::Retry if self.is_doomed() => match self.up {
                Some(_) => vec![Effect::Act(Action::Kill)],
                None => vec![],
            },
            Timer::Retry => self.retry(),
            Timer::Deadline | Timer::Settle | Timer::Resend | Timer::Linger => self.moving_timer(timer),
        }
    }

    fn peer(&mut self, peer: Peer) -> Vec<Effect> {
        if let Some(effects) = self.moving_peer(peer) {
            return effects;
        }
        match self.saved.decision {
            Some(decision)
                if decision.source == peer.host
                    && decision.granted == peer.granted
                    && matches!(peer.message, Message::Release | Message::Ask) =>
            {
                vec![Effect::Say(Peer {
                    message: decision.message,
                    ..peer
                })]
            }
            // Not ours to answer: a missing record is no proof that nothing happened.
            _ => vec![],
        }
    }

    fn tunnel(&mut self, event: TunnelEvent) -> Vec<Effect> {
        if self.is_moving() {
            self.moving_tunnel(event)
        } else {
            vec![]
        }
    }

    /// Whether the guest should run here.
    pub(crate) fn wants_run(&self) -> bool {
        self.saved.power == Power::On
    }
}
