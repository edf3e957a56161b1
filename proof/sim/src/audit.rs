//! What must never be, and what must come about.

use driver::Condition;
use handover::{Destination, Source};
use model::{VmId, VmState};
use task::Role;

use crate::{Checked, Sim, controller::OFFERED_MIB};

impl Sim {
    pub(crate) fn memory_of(&self, vm: VmId) -> u64 {
        let row = self.rows.get(&model::Key::Vm(vm));
        match row {
            Some(model::Row::Vm(vm)) => vm.spec.memory_mib,
            _ => 0,
        }
    }

    /// Hosts never hold more memory of VMs than they offer.
    pub(crate) fn check_capacity(&self, host: usize) -> Checked {
        let held: u64 = self
            .processes
            .values()
            .filter(|process| process.host == host)
            .map(|process| process.memory_mib)
            .sum();
        if held > OFFERED_MIB {
            return Err(format!("h{host} holds {held} MiB, and offers {OFFERED_MIB}"));
        }
        Ok(())
    }

    /// A guest has just begun to run: nobody else runs it, and its host holds it.
    pub(crate) fn check_running(&self, id: u64) -> Checked {
        let Some(process) = self.processes.get(&id) else {
            return Ok(());
        };
        let (vm, host) = (process.vm, process.host);
        let other = self
            .processes
            .iter()
            .find(|&(&other, with)| other != id && with.vm == vm && with.condition == Condition::Running);
        if let Some((_, other)) = other {
            return Err(format!("VM {vm} runs on h{host} and on h{}", other.host));
        }
        let holds = self.hosts[host]
            .journal
            .get(&vm)
            .is_some_and(|saved| match &saved.role {
                Role::None => false,
                Role::Holder => true,
                Role::Source { state, .. } => Source::may_run(state),
                Role::Destination { state, .. } => Destination::may_run(state),
            });
        if !holds {
            return Err(format!("VM {vm} runs on h{host}, whose journal does not hold it"));
        }
        Ok(())
    }

    /// Faults have stopped and time has passed: what the world says is what the hosts do, and nothing is left over.
    pub(crate) fn check_end(&self) -> Checked {
        let Some(world) = &self.world else {
            return Err("the controller is not there at the end".to_owned());
        };
        if let Some(operation) = world.operations().find(|operation| !operation.state.is_over()) {
            return Err(format!(
                "{} of {} has not ended",
                operation.kind.name(),
                operation.target.name
            ));
        }
        for vm in world.vms() {
            let found: Vec<_> = self.processes.values().filter(|process| process.vm == vm.id).collect();
            let on = |condition: Condition| {
                found
                    .iter()
                    .filter(|process| {
                        process.condition == condition && Some(self.hosts[process.host].id) == vm.status.host
                    })
                    .count()
            };
            let right = match vm.status.state {
                VmState::Active => on(Condition::Running) == 1 && found.len() == 1,
                VmState::Paused => on(Condition::Standing) + on(Condition::Sent) == 1 && found.len() == 1,
                VmState::Inactive => found.is_empty(),
                // Unknown by the rules: a copy may stand where it was released; it does not run.
                VmState::Failed => found.is_empty() || vm.status.moving.is_some() && on(Condition::Running) == 0,
                VmState::Provisioning | VmState::Suspended | VmState::Migrating => false,
            };
            if !right {
                let seen: Vec<_> = found.iter().map(|process| (process.host, process.condition)).collect();
                return Err(format!(
                    "{} {} is {} at the end, and the hosts have {seen:?}",
                    vm.name, vm.id, vm.status.state
                ));
            }
        }
        self.check_left_over()
    }

    fn check_left_over(&self) -> Checked {
        let Some(world) = &self.world else { return Ok(()) };
        if let Some(process) = self.processes.values().find(|process| world.vm(process.vm).is_none()) {
            return Err(format!(
                "h{} has a process of VM {}, which is deleted",
                process.host, process.vm
            ));
        }
        for (n, host) in self.hosts.iter().enumerate() {
            // Where it cannot be known who has it, all is left as it is.
            let open = |vm: VmId| world.vm(vm).is_some_and(|vm| vm.status.moving.is_some());
            let lives = |vm: VmId| self.process_of(n, vm).is_some() || open(vm);
            if let Some(vm) = host.ports.keys().chain(&host.run_dirs).find(|vm| !lives(**vm)) {
                return Err(format!("h{n} has a port or directory of VM {vm}, and no process"));
            }
            if let Some((vm, _)) = host
                .tunnels
                .keys()
                .find(|(vm, _)| world.vm(*vm).is_none_or(|vm| vm.status.moving.is_none()))
            {
                return Err(format!("h{n} has a tunnel of VM {vm}"));
            }
        }
        let owned = |volume: &model::VolumeId| self.rows.contains_key(&model::Key::Volume(*volume));
        match self.disks.iter().find(|volume| !owned(volume)) {
            Some(volume) => Err(format!("volume {volume} is left on the pool")),
            None => Ok(()),
        }
    }
}
