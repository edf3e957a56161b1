//! What people ask for, while the run is not calm.

use model::{Command, Millis, Name, OperationId, command::CreateVm, layout::Family, name::Reference};

use crate::{Checked, Happens, Sim};

/// Names of VMs; each may exist once.
const NAMES: u64 = 10;

impl Sim {
    pub(crate) fn asks(&mut self) -> Checked {
        if self.calm {
            return Ok(());
        }
        self.after(100, 2_500, Happens::Asks);
        let n = self.chance.below(NAMES);
        let name: Name = format!("vm{n}").parse().map_err(|_| "a VM's name is none")?;
        let exists = self
            .world
            .iter()
            .flat_map(|world| world.vms())
            .any(|vm| vm.name == name);
        if !exists {
            let memory_mib = 256 << self.chance.below(3);
            return self.request(Command::CreateVm(wanted(name, memory_mib, !self.calm)));
        }
        let vm = Reference::Name(name);
        let command = match self.chance.below(22) {
            0 | 1 => Command::StartVm(vm),
            2 => Command::StopVm {
                vm,
                grace: Millis(1_500),
            },
            3 => Command::KillVm(vm),
            4 => Command::RebootVm(vm),
            5 => Command::PauseVm(vm),
            6 | 7 => Command::ResumeVm(vm),
            8 => Command::DeleteVm(vm),
            9 => Command::MigrateVm {
                vm,
                to: Some(self.any_host()?),
            },
            10 | 11 => match self.any_running() {
                Some(operation) => Command::CancelOperation(operation),
                None => return Ok(()),
            },
            _ => Command::MigrateVm { vm, to: None },
        };
        self.request(command)
    }

    fn any_host(&mut self) -> Result<Reference, String> {
        let n = self.chance.index(self.hosts.len());
        format!("h{n}")
            .parse()
            .map(Reference::Name)
            .map_err(|_| "a host's name is none".to_owned())
    }

    fn any_running(&mut self) -> Option<OperationId> {
        let operations = self.world.iter().flat_map(|world| world.operations());
        let running: Vec<OperationId> = operations
            .filter(|operation| !operation.state.is_over())
            .map(|operation| operation.id)
            .collect();
        let index = self.chance.index(running.len());
        running.get(index).copied()
    }
}

fn wanted(name: Name, memory_mib: u64, start: bool) -> CreateVm {
    CreateVm {
        name,
        template: Reference::Name("micro".parse().expect("`micro` is a name")),
        vcpus: 1,
        memory_mib,
        disk_bytes: None,
        family: Family::Q35,
        network: None,
        host: None,
        pool: None,
        start,
        hostname: None,
        ssh_keys: vec![],
        user_data: None,
        security_groups: vec![],
        allow_addresses: vec![],
    }
}
