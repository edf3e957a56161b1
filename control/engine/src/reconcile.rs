//! Looks at one VM and settles what is open: the same after a crash, an inventory, a report and a tick.

use model::{Operation, OperationKind, OperationState, Vm, VmId, VmState};

use crate::txn::Txn;

/// Reads the VM's rows and settles what they already decide.
pub(crate) fn vm(txn: &mut Txn<'_>, id: VmId) {
    settle_terms(txn, id);
    let Some(vm) = txn.world().vm(id) else { return };
    match txn.holding(id) {
        Some(operation) if is_fulfilled(vm, operation) => {
            let operation = operation.id;
            txn.finish(operation, OperationState::Succeeded);
        }
        None if vm.operation.is_some() => txn.edit_vm(id, |vm| vm.operation = None),
        _ => {}
    }
}

/// Whether the VM is as an operation wants it, whoever made it so.
fn is_fulfilled(vm: &Vm, operation: &Operation) -> bool {
    let off = matches!(vm.status.state, VmState::Inactive | VmState::Failed) && vm.status.moving.is_none();
    match operation.kind {
        OperationKind::StopVm | OperationKind::KillVm => off,
        OperationKind::CreateVm | OperationKind::StartVm | OperationKind::ResumeVm => {
            vm.status.state == VmState::Active
        }
        OperationKind::PauseVm => vm.status.state == VmState::Paused,
        _ => false,
    }
}

/// Forgets terms once the copy that lost is known to be gone; says that a VM is lost when both are.
pub(crate) fn settle_terms(txn: &mut Txn<'_>, id: VmId) {
    let Some(vm) = txn.world().vm(id) else { return };
    let Some(terms) = &vm.status.moving else { return };
    let moves = |held: &Operation| {
        held.migration()
            .is_some_and(|migration| migration.terms.granted == terms.granted)
    };
    if txn.holding(id).is_some_and(moves) {
        return;
    }
    let status = &vm.status;
    let source_clear = status.cleared.contains(&terms.source);
    let destination_clear = status.cleared.contains(&terms.destination);
    let is_over_there = status.generation == terms.granted;
    let known = matches!(status.state, VmState::Active | VmState::Paused);
    let settled = match (is_over_there, known) {
        (true, _) => source_clear,
        (false, true) => destination_clear,
        (false, false) => source_clear && destination_clear,
    };
    if !settled {
        return;
    }
    let lost = status.state == VmState::Migrating;
    txn.edit_vm(id, |vm| {
        vm.status.moving = None;
        vm.status.cleared.clear();
        if lost {
            vm.status.state = VmState::Failed;
            vm.status.reason = Some("both hosts of its last move have lost it; start it anew".to_owned());
        }
    });
}
