//! Giving an operation up: where that is harmless, or where the hand-over's own rules decide.

use model::{
    Code, Operation, OperationId, OperationKind, OperationState, Outcome, Refusal, Request, Stage, VmId, order::Verb,
    vm::Power,
};

use crate::{
    moves,
    request::{self, Decision, refuse},
    txn::Txn,
};

/// Gives an operation up.
pub(crate) fn operation(txn: &mut Txn<'_>, request: &Request, id: OperationId) -> Decision {
    let operation = txn
        .world()
        .operation(id)
        .filter(|operation| operation.project == request.actor.project);
    let operation = operation.cloned().ok_or_else(|| {
        let message = format!("there is no operation {id} in this project");
        refuse(Code::NotFound, message, "`godwit op list` shows those that are kept")
    })?;
    let name = operation.kind.name();
    match (&operation.state, &operation.kind) {
        (OperationState::Cancelled, _) => return Ok(Outcome::Operation(Box::new(operation))),
        (OperationState::Running, _) => {}
        (OperationState::Succeeded, OperationKind::MigrateVm(_)) => return Err(too_late(&operation)),
        (state, _) => {
            let message = format!("operation {name} {id} is over: it {}", state.name());
            return Err(refuse(Code::WrongState, message, "there is nothing to cancel"));
        }
    }
    let vm = VmId(operation.target.id);
    match &operation.kind {
        OperationKind::MigrateVm(migration) if migration.stage >= Stage::Commitment => Err(too_late(&operation)),
        _ if request.dry_run => Ok(Outcome::Done),
        OperationKind::MigrateVm(migration) => {
            let waits = migration.stage <= Stage::Reservation;
            txn.edit_operation(id, |operation| {
                if let Some(migration) = operation.migration_mut() {
                    migration.cancelling = true;
                }
            });
            if waits {
                let reason = Refusal::new(Code::Cancelled, format!("cancelled by {}", request.actor.subject));
                moves::withdraw(txn, vm, &reason);
            } else {
                moves::cancel_at_source(txn, vm);
            }
            request::outcome(txn, id)
        }
        OperationKind::CreateVm | OperationKind::StartVm => {
            txn.finish(id, OperationState::Cancelled);
            abandon_start(txn, vm, id);
            request::outcome(txn, id)
        }
        _ => {
            let message = format!("operation {name} {id} cannot be cancelled");
            let hint = format!("it ends by itself soon: `godwit op wait {id}`; `godwit vm kill` ends a VM at once");
            Err(refuse(Code::WrongState, message, hint))
        }
    }
}

fn too_late(operation: &Operation) -> Box<Refusal> {
    let message = format!(
        "too late to cancel: VM {} has changed hosts or is about to",
        operation.target.name
    );
    let hint = format!("move it back: `godwit vm migrate {}`", operation.target.name);
    refuse(Code::TooLate, message, hint)
}

/// Ends what may have been started of a VM: it keeps its place until its host has said that it is off.
pub(crate) fn abandon_start(txn: &mut Txn<'_>, vm: VmId, operation: OperationId) {
    let Some(host) = txn.world().vm(vm).and_then(|vm| vm.status.host) else {
        return;
    };
    txn.edit_vm(vm, |vm| {
        vm.status.reason = Some("its start was given up; its host has not yet said that it is off".to_owned());
        if vm.spec.power != Power::Off {
            vm.spec.power = Power::Off;
            vm.revision = vm.revision.next();
        }
    });
    txn.order(host, vm, operation, Verb::Kill);
}
