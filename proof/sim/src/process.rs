//! A hypervisor's process: outlives its agent, answers late, resumes by itself where QEMU does.

use driver::{Action, Condition, Happened, Mode};
use model::VmId;
use task::Input;

use crate::{Checked, Happens, Sim};

/// A process.
#[derive(Clone, Debug)]
pub(crate) struct Process {
    pub(crate) host: usize,
    pub(crate) vm: VmId,
    pub(crate) memory_mib: u64,
    pub(crate) condition: Condition,
    pub(crate) listening: bool,
    /// The copy that it sends.
    pub(crate) copy: Option<u64>,
    /// When what was asked last is done, and what was told last is heard: both in order.
    asked_until: u64,
    told_until: u64,
}

impl Process {
    pub(crate) fn new(host: usize, vm: VmId, memory_mib: u64, mode: Mode) -> Self {
        Self {
            host,
            vm,
            memory_mib,
            condition: match mode {
                Mode::Boot => Condition::Standing,
                Mode::Wait => Condition::Loading,
            },
            listening: false,
            copy: None,
            asked_until: 0,
            told_until: 0,
        }
    }
}

impl Sim {
    /// The process of a VM on a host.
    pub(crate) fn process_of(&self, host: usize, vm: VmId) -> Option<u64> {
        let found = self
            .processes
            .iter()
            .find(|(_, process)| process.host == host && process.vm == vm);
        found.map(|(&id, _)| id)
    }

    /// An agent asks a process for something.
    pub(crate) fn ask(&mut self, host: usize, vm: VmId, action: Action) {
        let Some(id) = self.process_of(host, vm) else { return };
        let delay = self.chance.between(1, 4);
        let process = self.processes.get_mut(&id).expect("it was just found");
        process.asked_until = process.asked_until.max(self.now + delay);
        let at = process.asked_until;
        self.at(at, Happens::Act { process: id, action });
    }

    /// A process tells its agent something, if one listens.
    pub(crate) fn tell(&mut self, id: u64, happened: Happened) {
        self.tell_after(id, 0, 3, happened);
    }

    pub(crate) fn tell_after(&mut self, id: u64, least: u64, most: u64, happened: Happened) {
        let delay = self.chance.between(least, most);
        let Some(process) = self.processes.get_mut(&id) else {
            return;
        };
        process.told_until = process.told_until.max(self.now + delay);
        let (host, vm, at) = (process.host, process.vm, process.told_until);
        self.feed_at(at, host, vm, Input::Driver(happened));
    }

    fn set(&mut self, id: u64, condition: Condition) -> Checked {
        if let Some(process) = self.processes.get_mut(&id) {
            process.condition = condition;
        }
        if condition == Condition::Running {
            self.check_running(id)
        } else {
            Ok(())
        }
    }

    fn wall_clock(&self) -> i64 {
        i64::try_from(self.now).unwrap_or(i64::MAX)
    }

    /// The guest runs, told to or by itself.
    pub(crate) fn runs(&mut self, id: u64) -> Checked {
        self.set(id, Condition::Running)?;
        let at_ms = self.wall_clock();
        self.tell(id, Happened::Running { at_ms });
        if !self.calm && self.chance.one_in(12) {
            self.after(500, 40_000, Happens::PowersOff { process: id });
        }
        Ok(())
    }

    /// The guest stands.
    pub(crate) fn stands(&mut self, id: u64, settled: bool) -> Checked {
        self.set(id, Condition::Standing)?;
        let at_ms = self.wall_clock();
        self.tell(id, Happened::Standing { at_ms, settled });
        Ok(())
    }

    pub(crate) fn act(&mut self, id: u64, action: &Action) -> Checked {
        let Some(process) = self.processes.get(&id) else {
            return Ok(());
        };
        let condition = process.condition;
        match (action, condition) {
            (Action::Run, Condition::Loading) => {
                let reason = "its state is still loading".to_owned();
                self.tell(id, Happened::Refused { action: "run", reason });
            }
            (Action::Run, Condition::Ended) | (Action::Announce, _) => {}
            (Action::Run, _) => self.runs(id)?,
            (Action::Stand, Condition::Running | Condition::Standing) => {
                let settled = self.stands_for_good(id);
                self.stands(id, settled)?;
            }
            (Action::Stand, _) => self.tell(
                id,
                Happened::Standing {
                    at_ms: 0,
                    settled: true,
                },
            ),
            (Action::PowerButton, _) => {
                if self.chance.one_in(5) {
                    self.note(|| "the guest does not heed the button".to_owned());
                } else {
                    self.after(50, 3_000, Happens::PowersOff { process: id });
                }
            }
            (Action::Reset, _) => self.tell(id, Happened::Reset),
            (Action::Kill, _) => self.ends(id, "killed")?,
            (Action::Listen, _) => {
                if let Some(process) = self.processes.get_mut(&id) {
                    process.listening = true;
                }
                self.tell(id, Happened::Listening);
            }
            (Action::Copy(_), _) => self.copy_begins(id),
            (Action::Attend, _) => self.attend(id),
            (Action::CancelCopy, _) => self.copy_cancelled(id)?,
        }
        Ok(())
    }

    pub(crate) fn powers_off(&mut self, id: u64) -> Checked {
        let running = self
            .processes
            .get(&id)
            .is_some_and(|process| process.condition == Condition::Running);
        if running {
            self.set(id, Condition::Ended)?;
            self.tell(id, Happened::PoweredOff);
            self.after(
                1,
                30,
                Happens::Ends {
                    process: id,
                    why: "its guest powered off",
                },
            );
        }
        Ok(())
    }

    pub(crate) fn ends(&mut self, id: u64, why: &'static str) -> Checked {
        if !self.processes.contains_key(&id) {
            return Ok(());
        }
        self.tell(id, Happened::Died { detail: why.to_owned() });
        self.processes.remove(&id);
        self.copies_of_dead(id)
    }
}
