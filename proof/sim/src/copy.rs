//! Copies of memory and their tunnels, with QEMU's traps: completes by itself, resumes by itself when it fails late, acknowledges late.

use driver::{Condition, CopyCost, CopyState, Happened};
use model::{Generation, VmId};
use task::{Input, TunnelEvent};

use crate::{Checked, Happens, Sim};

/// Bytes of a guest's memory that are written again in each round.
const DIRTY_BYTES: u64 = 8 << 20;
/// Speed of a copy.
const BYTES_PER_S: u64 = 1 << 30;
/// A tunnel that is not used ends itself after this long.
const TUNNEL_IDLE_MS: u64 = 90_000;

/// A copy under way, or over.
#[derive(Clone, Debug)]
pub(crate) struct Copy {
    from: u64,
    to: u64,
    stage: Stage,
    round: u64,
    rounds: u64,
    /// The guest ran when completion began.
    resumes: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Rounds,
    Completing,
    Loaded,
    Completed,
    Failed,
}

impl Stage {
    const fn is_over(self) -> bool {
        matches!(self, Self::Completed | Self::Failed)
    }
}

/// One end of a tunnel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct End {
    serial: u64,
    /// The other end, once connected.
    pub(crate) peer: Option<usize>,
    port: u16,
    pub(crate) flow: Flow,
}

/// Whether a source's tunnel takes bytes from its hypervisor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flow {
    Held,
    /// While its agent lives.
    Flowing,
    Free,
}

impl Sim {
    pub(crate) fn tunnel_listens(&mut self, host: usize, vm: VmId, granted: Generation) {
        let serial = self.fresh();
        let port = 20_000 + u16::try_from(self.chance.below(1_000)).unwrap_or(0);
        let end = End {
            serial,
            peer: None,
            port,
            flow: Flow::Free,
        };
        self.hosts[host].tunnels.insert((vm, granted), end);
        self.feed(2, 30, host, vm, Input::Tunnel(TunnelEvent::Listening { port }));
        self.at(
            self.now + TUNNEL_IDLE_MS,
            Happens::TunnelEnds {
                host,
                vm,
                granted,
                serial,
            },
        );
    }

    pub(crate) fn tunnel_dials(&mut self, host: usize, vm: VmId, granted: Generation, to: usize) {
        let serial = self.fresh();
        let end = End {
            serial,
            peer: None,
            port: 0,
            flow: Flow::Held,
        };
        self.hosts[host].tunnels.insert((vm, granted), end);
        self.after(2, 40, Happens::Dialled { host, vm, granted, to });
        self.at(
            self.now + TUNNEL_IDLE_MS,
            Happens::TunnelEnds {
                host,
                vm,
                granted,
                serial,
            },
        );
    }

    pub(crate) fn dialled(&mut self, host: usize, vm: VmId, granted: Generation, to: usize) -> Checked {
        let free = self.hosts[to]
            .tunnels
            .get(&(vm, granted))
            .is_some_and(|end| end.peer.is_none());
        if !self.hosts[host].tunnels.contains_key(&(vm, granted)) {
            return Ok(());
        }
        if !free || self.is_cut(host, to) {
            self.hosts[host].tunnels.remove(&(vm, granted));
            let reason = "nobody answers there".to_owned();
            self.feed(10, 5_000, host, vm, Input::Tunnel(TunnelEvent::Failed { reason }));
            return Ok(());
        }
        for (end, peer) in [(host, to), (to, host)] {
            if let Some(end) = self.hosts[end].tunnels.get_mut(&(vm, granted)) {
                end.peer = Some(peer);
            }
            self.feed(1, 5, end, vm, Input::Tunnel(TunnelEvent::Connected));
        }
        Ok(())
    }

    /// What the agent says of its tunnel's stream.
    pub(crate) fn tunnel_flow(&mut self, host: usize, vm: VmId, flow: Flow) {
        for (_, end) in self.hosts[host].tunnels.iter_mut().filter(|((of, _), _)| *of == vm) {
            end.flow = flow;
        }
        if flow == Flow::Held {
            self.count("stream held");
        }
    }

    fn is_held(&self, copy: &Copy) -> bool {
        let Some(process) = self.processes.get(&copy.from) else {
            return false;
        };
        let mut ends = self.hosts[process.host].tunnels.iter();
        ends.any(|((of, _), end)| *of == process.vm && end.flow == Flow::Held)
    }

    /// After a restart of the agent.
    pub(crate) fn tunnel_adopted(&mut self, host: usize, vm: VmId) {
        let ends = &self.hosts[host].tunnels;
        let found = ends.iter().rev().find(|((of, _), _)| *of == vm).map(|(_, end)| *end);
        let event = match found {
            Some(End { peer: Some(_), .. }) => TunnelEvent::Connected,
            Some(End { port, .. }) if port > 0 => TunnelEvent::Listening { port },
            Some(_) => return,
            None => TunnelEvent::Failed {
                reason: "it is gone".to_owned(),
            },
        };
        self.feed(1, 20, host, vm, Input::Tunnel(event));
    }

    /// An end is closed: the other ends with it, and a copy through it breaks.
    pub(crate) fn tunnel_closed(&mut self, host: usize, vm: VmId) -> Checked {
        let ends = &self.hosts[host].tunnels;
        let found: Vec<Generation> = ends
            .keys()
            .filter(|(of, _)| *of == vm)
            .map(|(_, granted)| *granted)
            .collect();
        for granted in found {
            self.tunnel_gone(host, vm, granted)?;
        }
        Ok(())
    }

    pub(crate) fn tunnel_gone(&mut self, host: usize, vm: VmId, granted: Generation) -> Checked {
        let Some(end) = self.hosts[host].tunnels.remove(&(vm, granted)) else {
            return Ok(());
        };
        let closed = || Input::Tunnel(TunnelEvent::Closed { wire_bytes: 1 << 20 });
        self.feed(1, 10, host, vm, closed());
        let Some(peer) = end.peer else { return Ok(()) };
        if self.hosts[peer].tunnels.remove(&(vm, granted)).is_some() {
            self.feed(1, 10, peer, vm, closed());
        }
        self.copies_between(host, peer, vm)
    }

    pub(crate) fn tunnel_ends(&mut self, host: usize, vm: VmId, granted: Generation, serial: u64) -> Checked {
        let same = self.hosts[host]
            .tunnels
            .get(&(vm, granted))
            .is_some_and(|end| end.serial == serial);
        let open = self.copies.values().any(|copy| {
            let of = |id| self.processes.get(&id).is_some_and(|process| process.vm == vm);
            !copy.stage.is_over() && of(copy.from)
        });
        match (same, open) {
            (false, _) => Ok(()),
            (true, true) => {
                self.at(
                    self.now + TUNNEL_IDLE_MS,
                    Happens::TunnelEnds {
                        host,
                        vm,
                        granted,
                        serial,
                    },
                );
                Ok(())
            }
            (true, false) => self.tunnel_gone(host, vm, granted),
        }
    }

    pub(crate) fn copy_begins(&mut self, from: u64) {
        let Some(process) = self.processes.get(&from) else {
            return;
        };
        let (host, vm) = (process.host, process.vm);
        let ends = &self.hosts[host].tunnels;
        let peer = ends
            .iter()
            .rev()
            .find(|((of, _), _)| *of == vm)
            .and_then(|(_, end)| end.peer);
        let to = peer.and_then(|peer| self.process_of(peer, vm));
        let Some(to) =
            to.filter(|to| self.processes[to].listening && self.processes[to].condition == Condition::Loading)
        else {
            return self.tell(
                from,
                Happened::CopyFailed {
                    reason: "the stream was not taken".to_owned(),
                },
            );
        };
        let (id, rounds) = (self.fresh(), self.chance.between(1, 6));
        let copy = Copy {
            from,
            to,
            stage: Stage::Rounds,
            round: 1,
            rounds,
            resumes: false,
        };
        self.copies.insert(id, copy);
        if let Some(process) = self.processes.get_mut(&from) {
            process.copy = Some(id);
        }
        self.after(10, 200, Happens::CopyOn { copy: id });
    }

    pub(crate) fn copy_on(&mut self, id: u64) -> Checked {
        let Some(copy) = self.copies.get(&id).cloned() else {
            return Ok(());
        };
        let alive = self.processes.contains_key(&copy.from) && self.processes.contains_key(&copy.to);
        if copy.stage.is_over() {
            return Ok(());
        }
        if !alive || self.is_cut(self.processes[&copy.from].host, self.processes[&copy.to].host) {
            return self.copy_fails(id, "the stream broke");
        }
        match copy.stage {
            // Nothing is taken from it; a copy that ends already may be through.
            Stage::Rounds if self.is_held(&copy) => {
                self.tell(copy.from, Happened::Copying(state(copy.round, DIRTY_BYTES)));
            }
            Stage::Rounds if copy.round <= copy.rounds => self.round(id, &copy),
            Stage::Rounds => {
                let ran = self.processes[&copy.from].condition == Condition::Running;
                self.update(id, |copy| {
                    copy.stage = Stage::Completing;
                    copy.resumes = ran;
                });
                if ran {
                    self.stands(copy.from, false)?;
                }
            }
            Stage::Completing => {
                self.update(id, |copy| copy.stage = Stage::Loaded);
                if let Some(process) = self.processes.get_mut(&copy.to) {
                    process.condition = Condition::Standing;
                }
                self.tell(copy.to, Happened::Loaded);
            }
            Stage::Loaded => {
                self.update(id, |copy| copy.stage = Stage::Completed);
                if let Some(process) = self.processes.get_mut(&copy.from) {
                    process.condition = Condition::Sent;
                }
                let cost = CopyCost {
                    downtime_ms: 3,
                    bytes: 1 << 28,
                };
                self.tell(copy.from, Happened::Copied { cost });
            }
            Stage::Completed | Stage::Failed => {}
        }
        self.after(1, 60, Happens::CopyOn { copy: id });
        Ok(())
    }

    fn round(&mut self, id: u64, copy: &Copy) {
        let left = if copy.round == copy.rounds && copy.round > 1 {
            1 << 10
        } else {
            DIRTY_BYTES * 4
        };
        self.tell(copy.from, Happened::Copying(state(copy.round, left)));
        self.update(id, |copy| copy.round += 1);
    }

    fn update(&mut self, id: u64, change: impl FnOnce(&mut Copy)) {
        if let Some(copy) = self.copies.get_mut(&id) {
            change(copy);
        }
    }

    /// Whether a guest that is told to stand now stays so, whatever becomes of its copy.
    pub(crate) fn stands_for_good(&self, id: u64) -> bool {
        let copy = self
            .processes
            .get(&id)
            .and_then(|process| process.copy)
            .and_then(|copy| self.copies.get(&copy));
        copy.is_none_or(|copy| !copy.resumes || copy.stage.is_over())
    }

    fn copy_fails(&mut self, id: u64, why: &'static str) -> Checked {
        let Some(copy) = self.copies.get(&id).cloned().filter(|copy| !copy.stage.is_over()) else {
            return Ok(());
        };
        self.update(id, |copy| copy.stage = Stage::Failed);
        if self.processes.contains_key(&copy.from) {
            if copy.resumes {
                self.runs(copy.from)?;
            }
            self.tell(copy.from, Happened::CopyFailed { reason: why.to_owned() });
        }
        let loading = self
            .processes
            .get(&copy.to)
            .is_some_and(|process| process.condition == Condition::Loading);
        if loading {
            self.tell(copy.to, Happened::LoadFailed { reason: why.to_owned() });
        }
        Ok(())
    }

    pub(crate) fn copy_cancelled(&mut self, process: u64) -> Checked {
        let copy = self.processes.get(&process).and_then(|process| process.copy);
        let stage = copy.and_then(|copy| self.copies.get(&copy)).map(|copy| copy.stage);
        match (copy, stage) {
            (_, Some(Stage::Completed)) => {
                self.tell(
                    process,
                    Happened::Copied {
                        cost: CopyCost::default(),
                    },
                );
                Ok(())
            }
            (Some(copy), Some(stage)) if !stage.is_over() => self.copy_fails(copy, "cancelled"),
            _ => {
                self.tell(
                    process,
                    Happened::CopyFailed {
                        reason: "there is no copy".to_owned(),
                    },
                );
                Ok(())
            }
        }
    }

    /// An agent that found the process again asks how its copy stands.
    pub(crate) fn attend(&mut self, process: u64) {
        let copy = self.processes.get(&process).and_then(|process| process.copy);
        let Some(copy) = copy.and_then(|copy| self.copies.get(&copy)).cloned() else {
            return self.tell(
                process,
                Happened::CopyFailed {
                    reason: "none was begun".to_owned(),
                },
            );
        };
        match copy.stage {
            Stage::Rounds => self.tell(process, Happened::Copying(state(copy.round, DIRTY_BYTES))),
            Stage::Completing | Stage::Loaded => {
                let settled = !copy.resumes;
                self.tell(process, Happened::Standing { at_ms: 0, settled });
            }
            Stage::Completed => self.tell(
                process,
                Happened::Copied {
                    cost: CopyCost::default(),
                },
            ),
            Stage::Failed => self.tell(
                process,
                Happened::CopyFailed {
                    reason: "it broke".to_owned(),
                },
            ),
        }
    }

    pub(crate) fn copies_of_dead(&mut self, process: u64) -> Checked {
        let broken: Vec<u64> = self
            .copies
            .iter()
            .filter(|(_, copy)| copy.from == process || copy.to == process)
            .map(|(&id, _)| id)
            .collect();
        broken
            .into_iter()
            .try_for_each(|id| self.copy_fails(id, "the other end is gone"))
    }

    fn copies_between(&mut self, a: usize, b: usize, vm: VmId) -> Checked {
        let at = |id: u64| {
            self.processes
                .get(&id)
                .filter(|process| process.vm == vm)
                .map(|process| process.host)
        };
        let broken: Vec<u64> = self
            .copies
            .iter()
            .filter(|(_, copy)| {
                [(at(copy.from), at(copy.to)), (at(copy.to), at(copy.from))].contains(&(Some(a), Some(b)))
            })
            .map(|(&id, _)| id)
            .collect();
        broken
            .into_iter()
            .try_for_each(|id| self.copy_fails(id, "the tunnel is gone"))
    }
}

fn state(round: u64, remaining_bytes: u64) -> CopyState {
    CopyState {
        bytes: round << 24,
        remaining_bytes,
        bytes_per_s: BYTES_PER_S,
        round,
        ended: None,
    }
}
