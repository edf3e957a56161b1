//! Life on one host: start, stop, pause, remove, and what is taken up again after a restart.

use driver::{Action, Condition, Mode};
use handover::Source;
use model::{
    Code, Definition, Millis, Refusal,
    order::{Happening, OffCause, VolumePlace},
    vm::Power,
};

use crate::{
    effect::{Effect, Timer},
    saved::{Pending, Role},
    task::Task,
};

/// Between two tries to let a guest run.
const RETRY: Millis = Millis(500);

impl Task {
    pub(crate) fn start(&mut self, definition: Box<Definition>, paused: bool) -> Vec<Effect> {
        match self.up {
            Some(Condition::Running) if !paused => self.answer(Happening::Running),
            Some(_) => self.answer_refused(Refusal::new(
                Code::WrongState,
                format!("VM {} is there already", self.saved.vm),
            )),
            None => {
                self.start_refused = None;
                self.saved.power = if paused { Power::Paused } else { Power::On };
                self.saved.role = Role::Holder;
                self.saved.definition = Some(definition);
                self.saved.pending = Some(Pending::Start);
                vec![self.save(), self.prepare(Mode::Boot)]
            }
        }
    }

    /// The process is there, for a start.
    pub(crate) fn started(&mut self) -> Vec<Effect> {
        match (&self.saved.pending, self.saved.power) {
            (Some(Pending::Start), Power::On) => vec![Effect::OpenPorts, Effect::Act(Action::Run)],
            (Some(Pending::Start), _) => {
                let mut effects = vec![Effect::OpenPorts];
                effects.extend(self.answer(Happening::Paused));
                effects
            }
            _ => vec![],
        }
    }

    pub(crate) fn not_prepared(&mut self, reason: Refusal) -> Vec<Effect> {
        match (&self.saved.role, &self.saved.pending) {
            (Role::Destination { .. }, _) => self.died(reason.message),
            (_, Some(Pending::Start)) => {
                self.saved.power = Power::Off;
                let mut effects = vec![Effect::Clear];
                effects.extend(self.answer_refused(reason));
                effects
            }
            _ => self.died(reason.message),
        }
    }

    pub(crate) fn not_spawned(&mut self, reason: String) -> Vec<Effect> {
        self.not_prepared(Refusal::new(Code::HostFailed, reason))
    }

    pub(crate) fn stop(&mut self, grace: Millis) -> Vec<Effect> {
        self.saved.power = Power::Off;
        match self.up {
            None => self.answer(Happening::Off {
                cause: OffCause::Ordered,
            }),
            Some(condition) => {
                self.saved.pending = Some(Pending::End { grace: Some(grace) });
                let mut effects = vec![self.save()];
                effects.extend(Self::press(condition));
                effects.push(Effect::Set(Timer::Grace, grace));
                effects
            }
        }
    }

    /// Asks the guest to power off.
    fn press(condition: Condition) -> Vec<Effect> {
        match condition {
            Condition::Running => vec![Effect::Act(Action::PowerButton)],
            // A guest that stands sees no button.
            Condition::Standing | Condition::Sent => {
                vec![Effect::Act(Action::Run), Effect::Act(Action::PowerButton)]
            }
            // There is no guest that could heed it.
            Condition::Loading => vec![Effect::Act(Action::Kill)],
            // Its death follows.
            Condition::Ended => vec![],
        }
    }

    /// The guest had its time, or cannot be asked: it is ended, also if the agent is restarted now.
    pub(crate) fn grace_over(&mut self) -> Vec<Effect> {
        match (&self.saved.pending, self.up) {
            (Some(Pending::End { .. }), Some(_)) => {
                self.saved.pending = Some(Pending::End { grace: None });
                vec![self.save(), Effect::Stop(Timer::Grace), Effect::Act(Action::Kill)]
            }
            _ => vec![],
        }
    }

    pub(crate) fn kill(&mut self) -> Vec<Effect> {
        self.end(Pending::End { grace: None })
    }

    pub(crate) fn remove(&mut self, volumes: Vec<VolumePlace>) -> Vec<Effect> {
        // Whoever is told to delete a VM's disks has it until they are gone, also one that never ran it.
        if self.saved.role == Role::None {
            self.saved.role = Role::Holder;
        }
        self.end(Pending::Remove { volumes })
    }

    fn end(&mut self, pending: Pending) -> Vec<Effect> {
        let moved = self.is_moving();
        if moved {
            self.saved.role = Role::Holder;
        }
        self.saved.power = Power::Off;
        self.saved.pending = Some(pending);
        let mut effects = vec![self.save(), Effect::Stop(Timer::Grace)];
        if moved {
            effects.extend(self.moving_dropped());
        }
        match self.up {
            Some(_) => effects.push(Effect::Act(Action::Kill)),
            // What prepares or spawns answers yet; its answer ends it.
            None if self.building => {}
            None => effects.extend(self.ended()),
        }
        effects
    }

    /// No process is left: what the order wanted done after that.
    fn ended(&mut self) -> Vec<Effect> {
        let mut effects = vec![Effect::Stop(Timer::Grace), Effect::Clear];
        match &self.saved.pending {
            Some(Pending::Remove { volumes }) => effects.push(Effect::DeleteFiles(volumes.clone())),
            _ => effects.extend(self.answer(Happening::Off {
                cause: OffCause::Ordered,
            })),
        }
        effects
    }

    pub(crate) fn files_deleted(&mut self, result: Result<(), Refusal>) -> Vec<Effect> {
        match (&self.saved.pending, result) {
            (Some(Pending::Remove { .. }), Ok(())) => {
                self.saved.role = Role::None;
                self.saved.definition = None;
                let mut effects = self.answer(Happening::Removed);
                effects.push(Effect::Gone);
                effects
            }
            // It was ended for this: it is not as it was.
            (Some(Pending::Remove { .. }), Err(reason)) => {
                let mut effects = self.answer_refused(reason);
                effects.push(self.report(Happening::Off {
                    cause: OffCause::Ordered,
                }));
                effects
            }
            _ => vec![],
        }
    }

    pub(crate) fn reboot(&mut self) -> Vec<Effect> {
        self.ask(Pending::Reboot, Action::Reset)
    }

    pub(crate) fn pause(&mut self) -> Vec<Effect> {
        self.saved.power = Power::Paused;
        self.ask(Pending::Pause, Action::Stand)
    }

    pub(crate) fn resume(&mut self) -> Vec<Effect> {
        self.saved.power = Power::On;
        self.ask(Pending::Resume, Action::Run)
    }

    fn ask(&mut self, pending: Pending, action: Action) -> Vec<Effect> {
        if self.up.is_none() {
            self.saved.power = Power::Off;
            return self.answer_refused(Refusal::new(
                Code::WrongState,
                format!("VM {} is off on this host", self.saved.vm),
            ));
        }
        self.saved.pending = Some(pending);
        vec![self.save(), Effect::Act(action)]
    }

    /// The guest runs.
    pub(crate) fn running(&mut self, at_ms: i64) -> Vec<Effect> {
        if self.is_moving() {
            return self.moving_running(at_ms);
        }
        match &self.saved.pending {
            Some(Pending::Start | Pending::Resume) => self.answer(Happening::Running),
            Some(_) => vec![],
            // By itself, or by a hand at its monitor: say what is seen.
            None => vec![self.report(Happening::Running)],
        }
    }

    /// The guest stands.
    pub(crate) fn standing(&mut self, at_ms: i64, settled: bool) -> Vec<Effect> {
        if self.is_moving() {
            return self.moving_standing(at_ms, settled);
        }
        match &self.saved.pending {
            Some(Pending::Pause) => self.answer(Happening::Paused),
            Some(_) => vec![],
            None => vec![self.report(Happening::Paused)],
        }
    }

    /// The process is dead.
    pub(crate) fn died(&mut self, detail: String) -> Vec<Effect> {
        if self.is_moving() {
            return self.moving_died(&detail);
        }
        match &self.saved.pending {
            Some(Pending::End { .. } | Pending::Remove { .. }) => self.ended(),
            Some(Pending::Start) if self.start_refused.is_some() => match self.start_refused.take() {
                Some(reason) => self.not_prepared(reason),
                None => vec![],
            },
            _ => self.off(detail),
        }
    }

    /// It is off without having been told to.
    pub(crate) fn off(&mut self, detail: String) -> Vec<Effect> {
        let guest = std::mem::take(&mut self.powered_off);
        self.saved.power = Power::Off;
        let cause = if guest {
            OffCause::Guest
        } else {
            OffCause::Died { detail }
        };
        let mut effects = vec![Effect::Clear];
        effects.extend(self.answer(Happening::Off { cause }));
        effects
    }

    pub(crate) fn refused(&mut self, action: &str, reason: &str) -> Vec<Effect> {
        let text = format!("VM {}: {action} failed: {reason}", self.saved.vm);
        if self.is_doomed() {
            return self.end_again();
        }
        if self.is_moving() {
            return self.moving_refused(&text);
        }
        match &self.saved.pending {
            Some(Pending::End { .. }) => self.grace_over(),
            // Nothing may be left of a start that is refused: it is answered once the process is dead.
            Some(Pending::Start) => {
                self.start_refused = Some(Refusal::new(Code::HostFailed, text));
                vec![Effect::Act(Action::Kill)]
            }
            Some(_) => {
                self.saved.power = match self.up {
                    Some(Condition::Running) => Power::On,
                    Some(_) => Power::Paused,
                    None => Power::Off,
                };
                self.answer_refused(Refusal::new(Code::HostFailed, text))
            }
            None => self.try_again(),
        }
    }

    /// Sets the timer for another try, where the guest should run here, may, and does not, or a move waits for what was refused.
    pub(crate) fn try_again(&self) -> Vec<Effect> {
        match self.stands_wrongly() || !self.moving_asked_again().is_empty() {
            true => vec![Effect::Set(Timer::Retry, RETRY)],
            false => vec![],
        }
    }

    pub(crate) fn retry(&self) -> Vec<Effect> {
        match self.stands_wrongly() {
            true => vec![
                Effect::OpenPorts,
                Effect::Act(Action::Run),
                Effect::Act(Action::Announce),
            ],
            false => self.moving_asked_again(),
        }
    }

    /// Whether the guest should run here, may, and does not.
    fn stands_wrongly(&self) -> bool {
        let may = match &self.saved.role {
            Role::Holder => self.saved.pending.is_none(),
            Role::Source { state, .. } => matches!(state, Source::Kept { .. } | Source::Reclaimed),
            Role::Destination { state, .. } => state.may_run(),
            Role::None => false,
        };
        let stands = matches!(
            self.up,
            Some(Condition::Standing | Condition::Sent | Condition::Loading)
        );
        may && stands && self.wants_run() && !self.recovering
    }

    /// After a restart: the process is there.
    pub(crate) fn found(&mut self, condition: Condition) -> Vec<Effect> {
        if self.is_moving() {
            return self.moving_found(condition);
        }
        match self.saved.pending.clone() {
            _ if self.is_doomed() => vec![Effect::Act(Action::Kill)],
            Some(Pending::Start) => match self.saved.power {
                Power::On if condition == Condition::Running => self.answer(Happening::Running),
                _ => self.started(),
            },
            // It has its grace anew: who upgrades an agent does not cut a guest's last words short.
            Some(Pending::End { .. }) => Self::press(condition),
            // It is doomed.
            Some(Pending::Remove { .. }) => vec![],
            Some(Pending::Pause) => vec![Effect::Act(Action::Stand)],
            Some(Pending::Resume) => vec![Effect::Act(Action::Run)],
            Some(Pending::Reboot) => vec![Effect::Act(Action::Reset)],
            None => self.as_wanted(condition),
        }
    }

    /// Makes a held VM do what it should, where it does not.
    pub(crate) fn as_wanted(&mut self, condition: Condition) -> Vec<Effect> {
        match (self.saved.power, condition) {
            (Power::On, Condition::Standing | Condition::Sent) => vec![Effect::OpenPorts, Effect::Act(Action::Run)],
            (Power::Paused, Condition::Running) => vec![Effect::Act(Action::Stand)],
            (Power::Off, _) | (_, Condition::Loading) => vec![Effect::Act(Action::Kill)],
            (Power::On, Condition::Running) => vec![self.report(Happening::Running)],
            (Power::Paused, Condition::Standing | Condition::Sent) => vec![self.report(Happening::Paused)],
            // Its death follows.
            (_, Condition::Ended) => vec![],
        }
    }

    /// After a restart: there is no process.
    pub(crate) fn not_found(&mut self, reason: &str) -> Vec<Effect> {
        if self.is_moving() {
            return self.moving_not_found(reason);
        }
        match &self.saved.pending {
            Some(Pending::Start) => vec![self.prepare(Mode::Boot)],
            Some(Pending::End { .. } | Pending::Remove { .. }) => self.ended(),
            // The last agent may have died between its last record and clearing away.
            _ if self.saved.power == Power::Off => vec![Effect::Clear],
            _ => self.off(reason.to_owned()),
        }
    }

    /// After a reboot of the host: no process of the old boot is left.
    pub(crate) fn rebooted(&mut self) -> Vec<Effect> {
        if self.is_moving() {
            return self.moving_rebooted();
        }
        match &self.saved.pending {
            Some(Pending::Remove { .. } | Pending::End { .. }) => self.ended(),
            _ if self.saved.power == Power::Off => vec![self.save()],
            _ => self.off_by_reboot(),
        }
    }

    pub(crate) fn off_by_reboot(&mut self) -> Vec<Effect> {
        self.saved.power = Power::Off;
        let mut effects = vec![Effect::Clear];
        effects.extend(self.answer(Happening::Off {
            cause: OffCause::HostRebooted,
        }));
        effects
    }
}
