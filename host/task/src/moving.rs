//! A VM that moves: the two roles of a hand-over on this host, around the pure rules of `handover`.

use driver::{Action, Condition, CopyCost, CopyLimits, CopyState, Happened, Mode};
use handover::{Destination, DestinationEffect, DestinationInput, Source, SourceEffect, SourceInput};
use model::{
    Code, Definition, Message, Millis, Receipt, Refusal, Round, Terms,
    operation::Progress,
    order::{Endpoint, Happening},
    vm::Power,
};

use crate::{
    effect::{Effect, Missed, Peer, Timer, Tunnel, TunnelEvent},
    saved::{Decision, Role},
    standstill::{DOWNTIME_AIM, nearly_done},
    task::Task,
};

/// What a hand-over needs besides its journalled state. A restarted agent does without: the receipt is poorer then.
#[derive(Clone, Debug, Default)]
pub(crate) struct Move {
    /// Destination: the process waits for the stream.
    listening: bool,
    /// Destination: where the tunnel listens.
    tunnel_port: Option<u16>,
    /// Source: the destination's agent hears what is said to it.
    pub(crate) peer_up: bool,
    /// Source: the copy has been asked for.
    pub(crate) copying: bool,
    /// Source: how often the release has been said.
    said: u32,
    /// Source: a restarted agent has asked how the copy is, and has not heard yet.
    pub(crate) attending: bool,
    /// Source: some of it was copied by now.
    copied_some: bool,
    /// Source: rounds that ended.
    rounds: Vec<Round>,
    /// Source: what the copy cost.
    cost: Option<CopyCost>,
    /// Source: bytes on the wire.
    wire_bytes: Option<u64>,
    /// Source: the guest stood from the first byte on.
    stood_first: bool,
    /// Source: when the guest stood.
    pub(crate) stopped_at_ms: Option<i64>,
    /// Source: how its process ended.
    died: Option<String>,
    /// Source: the destination has it; the process is to end once its figures are in.
    tearing_down: bool,
}

/// Most rounds that a receipt keeps.
const ROUNDS_MAX: usize = 200;
/// Between the first two sayings of the same word; then twice as long each time.
const RESEND: Millis = Millis(200);
/// The longest time between two sayings of the same word.
const RESEND_MAX: Millis = Millis::seconds(2);
/// How long the last words may take on the tunnel once it is over.
const LINGER: Millis = Millis::seconds(1);
/// What the destination allows beyond the source's own deadline.
pub(crate) const MARGIN: Millis = Millis::seconds(30);
impl Task {
    pub(crate) fn receive(&mut self, terms: Terms, definition: Box<Definition>) -> Vec<Effect> {
        if terms.destination_boot != self.boot || terms.destination != self.host {
            return self.answer_refused(Refusal::new(
                Code::Stale,
                format!(
                    "VM {}: this host has rebooted since it was chosen; migrate again",
                    terms.vm
                ),
            ));
        }
        if self.up.is_some() {
            return self.answer_refused(Refusal::new(
                Code::WrongState,
                format!("VM {} is on this host", terms.vm),
            ));
        }
        let allowed = Millis(terms.deadline.0 + MARGIN.0);
        self.saved.definition = Some(definition);
        self.saved.power = if terms.run { Power::On } else { Power::Paused };
        self.saved.role = Role::Destination {
            terms: Box::new(terms.clone()),
            state: Destination::begin(),
        };
        self.moving = Move::default();
        let tunnel = Effect::Tunnel(Tunnel::Listen(Box::new(terms)));
        vec![
            self.save(),
            tunnel,
            self.prepare(Mode::Wait),
            Effect::Set(Timer::Deadline, allowed),
        ]
    }

    pub(crate) fn send(&mut self, terms: Terms, to: Endpoint) -> Vec<Effect> {
        if terms.source_boot != self.boot || terms.source != self.host || self.up.is_none() {
            return self.answer_refused(Refusal::new(
                Code::WrongState,
                format!(
                    "VM {} no longer runs on this host as it did when the move began",
                    terms.vm
                ),
            ));
        }
        let deadline = terms.deadline;
        let dial = Effect::Tunnel(Tunnel::Dial(Box::new(terms.clone()), to.clone()));
        self.saved.role = Role::Source {
            terms: Box::new(terms),
            to,
            state: Source::begin(),
        };
        self.moving = Move::default();
        vec![
            self.save(),
            // If it came here a moment ago: that move's last words must not end this move's tunnel.
            Effect::Stop(Timer::Linger),
            Effect::Tunnel(Tunnel::Close),
            dial,
            Effect::Set(Timer::Deadline, deadline),
        ]
    }

    pub(crate) fn cancel(&mut self, terms: &Terms) -> Vec<Effect> {
        let reason = Refusal::new(Code::Cancelled, "it was cancelled");
        match &self.saved.role {
            Role::Source {
                state: Source::Unknown, ..
            }
            | Role::Destination {
                state: Destination::Unknown,
                ..
            } => vec![self.save(), self.report(self.observed().what)],
            Role::Source { terms: mine, .. } if mine.granted == terms.granted => {
                self.source(SourceInput::GiveUp { reason })
            }
            Role::Destination { terms: mine, .. } if mine.granted == terms.granted => {
                self.destination(DestinationInput::GiveUp { reason: reason.message })
            }
            // It is over here: say again how it ended.
            _ => vec![self.save(), self.report(self.observed().what)],
        }
    }

    /// The hand-over is over by an order; nothing of it may go on.
    pub(crate) fn moving_dropped(&mut self) -> Vec<Effect> {
        self.moving = Move::default();
        let timers = [Timer::Deadline, Timer::Settle, Timer::Resend, Timer::Linger];
        let mut effects: Vec<_> = timers.into_iter().map(Effect::Stop).collect();
        effects.push(Effect::Tunnel(Tunnel::Close));
        effects.push(Effect::Missed(Missed::Drop));
        effects
    }

    /// What the inventory says of a VM that moves.
    pub(crate) fn observed_moving(&self) -> Happening {
        match &self.saved.role {
            Role::Source {
                state: Source::Released | Source::HandedOver,
                ..
            } => Happening::Released,
            Role::Source {
                state: Source::Unknown, ..
            }
            | Role::Destination {
                state: Destination::Unknown,
                ..
            } => Happening::Unknown {
                reason: REBOOTED.to_owned(),
            },
            Role::Destination {
                state: Destination::Run,
                ..
            } => Happening::Activated { resumed_at_ms: None },
            // A restarted agent does not know its tunnel's port yet; the journal has what it told the controller.
            Role::Destination { .. } => match (self.moving.tunnel_port, &self.saved.answer) {
                (Some(tunnel_port), _) => Happening::Receiving { tunnel_port },
                (None, Some(told @ Happening::Receiving { .. })) => told.clone(),
                (None, _) => Happening::Removed,
            },
            _ if self.moving.stopped_at_ms.is_some() => Happening::Stopped,
            _ => Happening::Copying,
        }
    }

    /// Steps the source's rules and carries out what they say.
    pub(crate) fn source(&mut self, input: SourceInput) -> Vec<Effect> {
        let Role::Source { state, .. } = &mut self.saved.role else {
            return vec![];
        };
        let effects = state.step(input);
        effects
            .into_iter()
            .flat_map(|effect| self.source_effect(effect))
            .collect()
    }

    fn source_effect(&mut self, effect: SourceEffect) -> Vec<Effect> {
        let Role::Source { terms, state, .. } = &self.saved.role else {
            return vec![];
        };
        match effect {
            SourceEffect::Journal => match state {
                Source::Released => vec![self.save(), self.report(Happening::Released)],
                _ => vec![self.save()],
            },
            SourceEffect::Flow => self.flow(),
            SourceEffect::Hold => vec![Effect::Tunnel(Tunnel::Hold)],
            SourceEffect::Stand => vec![Effect::Missed(Missed::Keep), Effect::Act(Action::Stand)],
            SourceEffect::CancelCopy if self.moving.copying => vec![Effect::Act(Action::CancelCopy)],
            SourceEffect::CancelCopy => self.source(SourceInput::CopyFailed {
                reason: Refusal::new(Code::Cancelled, "it was cancelled"),
            }),
            SourceEffect::Say(message) => {
                let word = Peer {
                    host: terms.destination,
                    granted: terms.granted,
                    message,
                };
                let pause = RESEND.0 << self.moving.said.min(4);
                self.moving.said += 1;
                let mut effects = vec![
                    Effect::Say(word),
                    Effect::Set(Timer::Resend, Millis(pause.min(RESEND_MAX.0))),
                ];
                if self.moving.said == 1 {
                    effects.push(Effect::Tunnel(Tunnel::Free));
                }
                effects
            }
            SourceEffect::Resume if self.up.is_some() && self.wants_run() => {
                vec![Effect::OpenPorts, Effect::Act(Action::Run)]
            }
            SourceEffect::Announce if self.up.is_some() => vec![Effect::Act(Action::Announce)],
            SourceEffect::Resume | SourceEffect::Announce => vec![],
            SourceEffect::TearDown => self.tear_down(),
            SourceEffect::TooLate => vec![self.report(Happening::TooLate)],
            SourceEffect::Over => self.source_over(),
        }
    }

    /// The VM stays, or has come back.
    fn source_over(&mut self) -> Vec<Effect> {
        let Role::Source { terms, state, .. } = &self.saved.role else {
            return vec![];
        };
        let what = match state {
            Source::Kept { reason } => Happening::Kept { reason: reason.clone() },
            Source::Reclaimed => {
                self.saved.generation = terms.reclaimed;
                Happening::Reclaimed {
                    reason: "the destination could not run it".to_owned(),
                }
            }
            _ => return vec![],
        };
        self.saved.role = Role::Holder;
        let mut effects = vec![
            Effect::Stop(Timer::Deadline),
            Effect::Stop(Timer::Resend),
            Effect::Tunnel(Tunnel::Close),
            Effect::Missed(Missed::Drop),
        ];
        match self.up {
            Some(_) => effects.extend(self.answer(what)),
            // Off first: nobody is to take it for running.
            None => {
                let detail = self.moving.died.take();
                effects.extend(self.off(detail.unwrap_or_else(|| "it died while it was moved".to_owned())));
                effects.push(self.report(what));
            }
        }
        effects
    }

    /// Nothing may be left here; but the copy's last figures are worth a moment.
    fn tear_down(&mut self) -> Vec<Effect> {
        self.moving.tearing_down = true;
        self.saved.power = Power::Off;
        let mut effects = self.hand_over_missed();
        effects.extend([Effect::Stop(Timer::Deadline), Effect::Stop(Timer::Resend)]);
        match (self.up, self.moving.cost, self.moving.copying) {
            (None, _, _) => effects.extend(self.torn_down()),
            (Some(_), None, true) => effects.push(Effect::Set(Timer::Linger, LINGER)),
            (Some(_), _, _) => effects.push(Effect::Act(Action::Kill)),
        }
        effects
    }

    /// The process is dead; the receipt waits for the tunnel's figures.
    fn torn_down(&mut self) -> Vec<Effect> {
        if self.moving.wire_bytes.is_none() {
            return vec![Effect::Set(Timer::Linger, LINGER), Effect::Tunnel(Tunnel::Close)];
        }
        self.finish_teardown()
    }

    fn finish_teardown(&mut self) -> Vec<Effect> {
        let algorithm = if self.moving.stood_first {
            "stop-and-copy"
        } else {
            "pre-copy"
        };
        let receipt = Receipt {
            algorithm: algorithm.to_owned(),
            qemu_downtime_ms: self.moving.cost.map(|cost| cost.downtime_ms),
            bytes: self.moving.cost.map(|cost| cost.bytes),
            wire_bytes: self.moving.wire_bytes,
            rounds: std::mem::take(&mut self.moving.rounds),
            ..Receipt::default()
        };
        let stopped_at_ms = self.moving.stopped_at_ms;
        self.saved.role = Role::None;
        self.saved.definition = None;
        self.moving = Move::default();
        let mut effects = vec![
            Effect::Stop(Timer::Linger),
            Effect::Tunnel(Tunnel::Close),
            Effect::Clear,
        ];
        effects.extend(self.answer(Happening::TornDown {
            receipt: Box::new(receipt),
            stopped_at_ms,
        }));
        effects.push(Effect::Gone);
        effects
    }

    /// Steps the destination's rules and carries out what they say.
    pub(crate) fn destination(&mut self, input: DestinationInput) -> Vec<Effect> {
        let Role::Destination { state, .. } = &mut self.saved.role else {
            return vec![];
        };
        let effects = state.step(input);
        self.destination_effects(effects)
    }

    fn destination_effects(&mut self, effects: Vec<DestinationEffect>) -> Vec<Effect> {
        effects
            .into_iter()
            .flat_map(|effect| self.destination_effect(effect))
            .collect()
    }

    fn destination_effect(&mut self, effect: DestinationEffect) -> Vec<Effect> {
        let Role::Destination { terms, .. } = &self.saved.role else {
            return vec![];
        };
        match effect {
            DestinationEffect::Journal => {
                self.decide();
                vec![self.save()]
            }
            DestinationEffect::Run if self.wants_run() => {
                vec![
                    Effect::OpenPorts,
                    Effect::Act(Action::Run),
                    Effect::Act(Action::Announce),
                ]
            }
            DestinationEffect::Run => {
                // The word goes out here: once it is activated the terms are gone.
                let word = Peer {
                    host: terms.source,
                    granted: terms.granted,
                    message: Message::Run,
                };
                let mut effects = vec![Effect::OpenPorts, Effect::Act(Action::Announce), Effect::Say(word)];
                effects.extend(self.activated(None));
                effects
            }
            DestinationEffect::Kill if self.up.is_some() => vec![Effect::Act(Action::Kill)],
            // What prepares or spawns answers yet; its answer ends it.
            DestinationEffect::Kill if self.building => vec![],
            DestinationEffect::Kill => self.destination(DestinationInput::Died { reason: String::new() }),
            DestinationEffect::Say(message) => {
                let word = Peer {
                    host: terms.source,
                    granted: terms.granted,
                    message,
                };
                let mut effects = vec![Effect::Say(word)];
                if message == Message::Ask {
                    effects.push(Effect::Set(Timer::Resend, RESEND));
                }
                effects
            }
            DestinationEffect::AllowSettle => vec![Effect::Set(Timer::Settle, terms.settle)],
            DestinationEffect::Over => self.destination_over(),
        }
    }

    /// Keeps the decision for a source that does not hear it.
    fn decide(&mut self) {
        let Role::Destination { terms, state } = &self.saved.role else {
            return;
        };
        let message = match state {
            Destination::Run => Message::Run,
            Destination::Void { .. } => Message::Void,
            _ => return,
        };
        self.saved.decision = Some(Decision {
            source: terms.source,
            granted: terms.granted,
            message,
        });
    }

    /// It is ours, and does what it should.
    fn activated(&mut self, resumed_at_ms: Option<i64>) -> Vec<Effect> {
        self.saved.role = Role::Holder;
        let mut effects = vec![
            Effect::Stop(Timer::Deadline),
            Effect::Stop(Timer::Settle),
            Effect::Stop(Timer::Resend),
            Effect::Set(Timer::Linger, LINGER),
        ];
        effects.extend(self.answer(Happening::Activated { resumed_at_ms }));
        effects
    }

    /// It will never be ours under these terms.
    fn destination_over(&mut self) -> Vec<Effect> {
        let Role::Destination { state, .. } = &self.saved.role else {
            return vec![];
        };
        let what = match state {
            Destination::Void { reason } => Happening::Voided { reason: reason.clone() },
            Destination::Unknown => {
                let what = Happening::Unknown {
                    reason: REBOOTED.to_owned(),
                };
                return vec![Effect::Clear, self.report(what)];
            }
            _ => return vec![],
        };
        self.saved.role = Role::None;
        self.saved.power = Power::Off;
        self.saved.definition = None;
        self.moving = Move::default();
        let mut effects = vec![
            Effect::Stop(Timer::Deadline),
            Effect::Stop(Timer::Settle),
            Effect::Stop(Timer::Resend),
            Effect::Tunnel(Tunnel::Close),
            Effect::Clear,
        ];
        effects.extend(self.answer(what));
        effects.push(Effect::Gone);
        effects
    }

    /// What the process says about the stream.
    pub(crate) fn moved(&mut self, happened: Happened) -> Vec<Effect> {
        if matches!(
            happened,
            Happened::Copying(_) | Happened::Copied { .. } | Happened::CopyFailed { .. }
        ) {
            self.moving.attending = false;
        }
        match happened {
            Happened::Listening => {
                self.moving.listening = true;
                self.say_receiving()
            }
            Happened::Copying(copy) => self.copying(copy),
            Happened::Copied { cost } => {
                self.moving.cost = Some(cost);
                self.moving.copying = false;
                match (self.moving.tearing_down, self.up) {
                    (true, Some(_)) => vec![Effect::Act(Action::Kill)],
                    _ => self.source(SourceInput::Copied),
                }
            }
            Happened::CopyFailed { reason } => {
                self.moving.copying = false;
                let reason = self.not_copied(&reason);
                self.source(SourceInput::CopyFailed { reason })
            }
            Happened::Loaded => self.destination(DestinationInput::Complete),
            Happened::LoadFailed { reason } => self.destination(DestinationInput::GiveUp { reason }),
            _ => vec![],
        }
    }

    fn copying(&mut self, copy: CopyState) -> Vec<Effect> {
        let mut effects = vec![];
        self.moving.copied_some = true;
        if self.moving.stopped_at_ms.is_none() {
            // The hypervisor may end a copy by itself, without being asked to stand.
            effects.push(Effect::Missed(Missed::Keep));
        }
        if let Some(round) = copy.ended
            && self.moving.rounds.len() < ROUNDS_MAX
        {
            // QEMU also counts those that were too short to be seen.
            let number = self.moving.rounds.len() as u64 + 1;
            self.moving.rounds.push(Round { number, ..round });
        }
        if let Some(operation) = self.saved.operation {
            let progress = Progress {
                doing: self.doing().to_owned(),
                bytes: copy.bytes,
                remaining_bytes: Some(copy.remaining_bytes),
                // As the receipt counts them: QEMU's own number grows also by rounds too short to be seen.
                round: Some(self.moving.rounds.len() as u64 + u64::from(copy.remaining_bytes > 0)),
            };
            effects.push(Effect::Progress(operation, progress));
        }
        if nearly_done(&copy) {
            effects.extend(self.source(SourceInput::NearlyDone));
        }
        effects
    }

    fn say_receiving(&mut self) -> Vec<Effect> {
        match self.moving.tunnel_port {
            // The journal keeps the answer, so that a restarted agent knows that it was given.
            Some(tunnel_port) if self.moving.listening => self.answer(Happening::Receiving { tunnel_port }),
            _ => vec![],
        }
    }

    pub(crate) fn moving_running(&mut self, at_ms: i64) -> Vec<Effect> {
        match &self.saved.role {
            Role::Destination {
                state: Destination::Run,
                ..
            } => self.activated(Some(at_ms)),
            _ => vec![],
        }
    }

    pub(crate) fn moving_standing(&mut self, at_ms: i64, settled: bool) -> Vec<Effect> {
        let Role::Source { state, .. } = &self.saved.role else {
            return vec![];
        };
        let first = self.moving.stopped_at_ms.is_none() && !state.is_over();
        let mut effects = vec![];
        if first {
            self.moving.stopped_at_ms = Some(at_ms);
            self.moving.stood_first = !self.moving.copied_some;
        }
        // The word that ends the wait goes out before the report.
        effects.extend(self.source(SourceInput::Stood { settled }));
        if first {
            effects.push(self.report(Happening::Stopped));
        }
        effects
    }

    pub(crate) fn moving_died(&mut self, detail: &str) -> Vec<Effect> {
        if self.moving.tearing_down {
            return self.torn_down();
        }
        match &self.saved.role {
            Role::Source { .. } => {
                let reason = self.died_moving(detail);
                self.moving.died = Some(detail.to_owned());
                self.source(SourceInput::Died { reason })
            }
            Role::Destination {
                state: Destination::Run,
                ..
            } => {
                let mut effects = self.activated(None);
                effects.extend(self.off(detail.to_owned()));
                effects
            }
            _ => self.destination(DestinationInput::Died {
                reason: detail.to_owned(),
            }),
        }
    }

    pub(crate) fn moving_timer(&mut self, timer: Timer) -> Vec<Effect> {
        let source = matches!(self.saved.role, Role::Source { .. });
        match timer {
            Timer::Linger if self.moving.tearing_down => match self.up {
                Some(_) => vec![Effect::Act(Action::Kill)],
                None => self.finish_teardown(),
            },
            Timer::Linger => vec![Effect::Tunnel(Tunnel::Close)],
            Timer::Resend if source => self.source(SourceInput::Resend),
            Timer::Resend => self.destination(DestinationInput::Resend),
            Timer::Deadline if source => {
                let reason = self.out_of_time();
                self.source(SourceInput::GiveUp { reason })
            }
            _ => self.destination(DestinationInput::GiveUp {
                reason: "its deadline passed".to_owned(),
            }),
        }
    }

    /// A word of the other side, if it is about the hand-over that is under way.
    pub(crate) fn moving_peer(&mut self, peer: Peer) -> Option<Vec<Effect>> {
        match &self.saved.role {
            Role::Source { terms, .. } if terms.granted == peer.granted && terms.destination == peer.host => {
                Some(self.source(SourceInput::Heard(peer.message)))
            }
            Role::Destination { terms, .. } if terms.granted == peer.granted && terms.source == peer.host => {
                Some(self.destination(DestinationInput::Heard(peer.message)))
            }
            _ => None,
        }
    }

    pub(crate) fn moving_tunnel(&mut self, event: TunnelEvent) -> Vec<Effect> {
        let source = matches!(self.saved.role, Role::Source { .. });
        match event {
            TunnelEvent::Listening { port } => {
                self.moving.tunnel_port = Some(port);
                self.say_receiving()
            }
            TunnelEvent::Connected if source && !self.moving.copying && self.moving.cost.is_none() => {
                self.moving.copying = true;
                let limits = CopyLimits {
                    bytes_per_s_max: None,
                    downtime_max: DOWNTIME_AIM,
                };
                let mut effects = self.flow();
                effects.extend([
                    // A driver may stand the guest before it copies.
                    Effect::Missed(Missed::Keep),
                    Effect::Act(Action::Copy(limits)),
                    self.report(Happening::Copying),
                ]);
                effects
            }
            TunnelEvent::Closed { wire_bytes } => {
                self.moving.wire_bytes = Some(wire_bytes);
                if self.moving.tearing_down && self.up.is_none() {
                    self.finish_teardown()
                } else {
                    vec![]
                }
            }
            // A copy that is under way sees the break itself.
            TunnelEvent::Failed { reason } if source && !self.moving.copying => {
                let text = format!("VM {}: no connection to the destination: {reason}", self.saved.vm);
                self.source(SourceInput::CopyFailed {
                    reason: Refusal::new(Code::HostUnreachable, text),
                })
            }
            // A tunnel that a restarted agent does not find again has done its part: the stream's end tells the rest.
            TunnelEvent::Failed { reason }
                if !source && self.moving.tunnel_port.is_none() && !self.told_receiving() =>
            {
                self.destination(DestinationInput::GiveUp { reason })
            }
            TunnelEvent::Failed { .. } | TunnelEvent::Connected => vec![],
        }
    }

    /// After a restart: the process is there.
    pub(crate) fn moving_found(&mut self, condition: Condition) -> Vec<Effect> {
        match self.saved.role.clone() {
            Role::Source { terms, state, .. } => {
                let state = Source::recover(&terms, Some(state), self.boot);
                self.set_source(state.clone());
                self.moving.copying = true;
                self.moving.attending = matches!(state, Source::Copying { .. });
                match state {
                    Source::Copying { .. } => {
                        let mut effects = self.found_copying(condition);
                        effects.push(Effect::Act(Action::Attend));
                        effects.push(Effect::Set(Timer::Deadline, terms.deadline));
                        effects
                    }
                    Source::Released => self.source(SourceInput::Resend),
                    Source::HandedOver => self.tear_down(),
                    Source::Kept { .. } | Source::Reclaimed => {
                        let mut effects = self.source_over();
                        effects.extend(self.as_wanted(condition));
                        effects
                    }
                    Source::Unknown => vec![],
                }
            }
            Role::Destination { terms, state } => {
                // A container of which the controller was not told is not worth keeping.
                let told = self.told_receiving();
                self.moving.listening = true;
                let recovered = Destination::recover(&terms, Some(state), self.boot, true);
                self.set_destination(recovered.state);
                let mut effects = self.destination_effects(recovered.effects);
                effects.push(Effect::Set(Timer::Deadline, Millis(terms.deadline.0 + MARGIN.0)));
                if !told {
                    let reason = "the agent restarted before it was ready".to_owned();
                    effects.extend(self.destination(DestinationInput::GiveUp { reason }));
                } else if matches!(condition, Condition::Standing | Condition::Sent) {
                    effects.extend(self.destination(DestinationInput::Complete));
                }
                effects
            }
            Role::None | Role::Holder => vec![],
        }
    }

    /// After a restart: there is no process.
    pub(crate) fn moving_not_found(&mut self, reason: &str) -> Vec<Effect> {
        let Role::Source { terms, state, .. } = self.saved.role.clone() else {
            // Its end was written down, and the agent died before it was through with it.
            return match self.destination_is_void() {
                true => self.destination_over(),
                false => self.moving_died(reason),
            };
        };
        let state = Source::recover(&terms, Some(state), self.boot);
        self.set_source(state.clone());
        match state {
            Source::Copying { .. } => self.moving_died(reason),
            // What was sent may be whole at the destination: it decides.
            Source::Released => self.source(SourceInput::Resend),
            Source::HandedOver => self.tear_down(),
            Source::Kept { .. } | Source::Reclaimed => self.source_over(),
            Source::Unknown => vec![],
        }
    }

    /// Destination: the controller was told that it is ready.
    const fn told_receiving(&self) -> bool {
        matches!(self.saved.answer, Some(Happening::Receiving { .. }))
    }

    fn destination_is_void(&self) -> bool {
        matches!(
            self.saved.role,
            Role::Destination {
                state: Destination::Void { .. },
                ..
            }
        )
    }

    /// After a reboot of the host.
    pub(crate) fn moving_rebooted(&mut self) -> Vec<Effect> {
        match self.saved.role.clone() {
            Role::Source { terms, state, .. } => {
                let state = Source::recover(&terms, Some(state), self.boot);
                self.set_source(state.clone());
                match state {
                    Source::Released | Source::Copying { .. } => self.source(SourceInput::Resend),
                    Source::HandedOver => self.finish_teardown(),
                    Source::Unknown => {
                        let what = Happening::Unknown {
                            reason: REBOOTED.to_owned(),
                        };
                        vec![self.save(), Effect::Clear, self.report(what)]
                    }
                    Source::Kept { .. } => {
                        self.saved.role = Role::Holder;
                        self.off_by_reboot()
                    }
                    Source::Reclaimed => {
                        self.saved.generation = terms.reclaimed;
                        self.saved.role = Role::Holder;
                        self.off_by_reboot()
                    }
                }
            }
            Role::Destination { terms, state } => {
                let recovered = Destination::recover(&terms, Some(state), self.boot, false);
                self.set_destination(recovered.state.clone());
                let mut effects = vec![self.save()];
                effects.extend(self.destination_effects(recovered.effects));
                match recovered.state {
                    Destination::Run => {
                        effects.extend(self.activated(None));
                        effects.extend(self.off_by_reboot());
                    }
                    Destination::Void { .. } => effects.extend(self.destination_over()),
                    _ => {}
                }
                effects
            }
            Role::None | Role::Holder => vec![],
        }
    }

    fn set_source(&mut self, new: Source) {
        if let Role::Source { state, .. } = &mut self.saved.role {
            *state = new;
        }
    }

    fn set_destination(&mut self, new: Destination) {
        if let Role::Destination { state, .. } = &mut self.saved.role {
            *state = new;
        }
    }
}

/// Why nothing can be known.
const REBOOTED: &str =
    "this host rebooted during the hand-over, and its journal cannot tell whether the VM had changed hosts";
