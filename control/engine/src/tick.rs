//! Time passes: operations end, tokens and answers expire, addresses are free again, and a few VMs are looked at.

use model::{Code, Key, Millis, Operation, OperationId, OperationKind, Refusal, VmId};

use crate::{cancel, lifecycle, moves, reconcile, templates, txn::Txn};

/// How long the answer to a request with an idempotency key is kept.
pub const ANSWER_KEPT: Millis = Millis::seconds(24 * 3600);
/// Most operations that are over and kept.
const FINISHED_MAX: usize = 10_000;
/// Most things of a kind that one tick deals with: the rest is due at once again.
const BATCH: usize = 256;
/// Most VMs that one tick reconciles, of those that changed and again of all.
const RECONCILE: usize = 64;

/// Does what is due, in bounded time.
pub(crate) fn tick(txn: &mut Txn<'_>) {
    expire_operations(txn);
    expire_rows(txn);
    prune_operations(txn);
    reconcile_some(txn);
}

fn expire_operations(txn: &mut Txn<'_>) {
    let now = txn.now;
    let due = txn.world().index.deadlines.iter().take_while(|(at, _)| *at <= now);
    let due: Vec<OperationId> = due.take(BATCH).map(|(_, id)| *id).collect();
    for id in due {
        if let Some(operation) = txn.world().operation(id).cloned() {
            expire(txn, &operation);
        }
    }
}

/// An operation is out of time: it ends, and what it began is taken back or said to be open.
fn expire(txn: &mut Txn<'_>, operation: &Operation) {
    let (id, vm) = (operation.id, VmId(operation.target.id));
    let world = txn.world();
    let host = world.vm(vm).and_then(|vm| vm.status.host);
    let by = host.map_or_else(|| "its host".to_owned(), |host| lifecycle::host_name(world, host));
    let (kind, name) = (operation.kind.name(), &operation.target.name);
    let message = format!("{kind} of {name}: {by} has not answered in time");
    let late = |hint: String| Refusal::new(Code::TimedOut, message.clone()).hint(hint);
    match &operation.kind {
        OperationKind::MigrateVm(migration) => moves::expire(txn, id, vm, migration),
        OperationKind::CreateVm | OperationKind::StartVm => {
            txn.fail(
                id,
                late(format!("look at {by}; the start is taken back as soon as it answers")),
            );
            cancel::abandon_start(txn, vm, id);
        }
        OperationKind::ImportTemplate | OperationKind::DeleteTemplate => templates::expire(txn, operation),
        // The order stands: a VM of which nobody knows whether it was started is not left to run.
        OperationKind::KillVm => {
            txn.fail(id, late(format!("look at {by}; the VM is ended as soon as it answers")));
        }
        // Part of its disks may be gone already: it is finished, not left half.
        OperationKind::DeleteVm => {
            txn.fail(
                id,
                late(format!("look at {by}; the VM is deleted as soon as it answers")),
            );
        }
        _ => {
            if let Some(host) = host {
                txn.withdraw(host, vm);
            }
            txn.fail(id, late(format!("look at {by}, then ask again")));
        }
    }
    // Whatever an arm above leaves running: every operation ends.
    txn.fail(id, late(String::new()));
}

fn expire_rows(txn: &mut Txn<'_>) {
    let now = txn.now;
    let index = &txn.world().index;
    let ports = index.resting.iter().take_while(|(at, _)| *at <= now);
    let ports = ports.take(BATCH).map(|(_, id)| Key::Port(*id));
    let joins = index.join_expiry.iter().take_while(|(at, _)| *at <= now);
    let joins = joins.take(BATCH).map(|(_, id)| Key::JoinToken(*id));
    let tokens = index.api_expiry.iter().take_while(|(at, _)| *at <= now);
    let tokens = tokens.take(BATCH).map(|(_, id)| Key::ApiToken(*id));
    let answers = index
        .answered
        .iter()
        .take_while(|(at, ..)| at.after(ANSWER_KEPT) <= now);
    let answers = answers
        .take(BATCH)
        .map(|(_, project, key)| Key::Answer(*project, key.clone()));
    let due: Vec<Key> = ports.chain(joins).chain(tokens).chain(answers).collect();
    due.into_iter().for_each(|key| txn.delete(key));
}

fn prune_operations(txn: &mut Txn<'_>) {
    let finished = &txn.world().index.finished;
    let over = finished.len().saturating_sub(FINISHED_MAX).min(BATCH);
    let oldest: Vec<OperationId> = finished.iter().take(over).map(|(_, id)| *id).collect();
    oldest.into_iter().for_each(|id| txn.delete(Key::Operation(id)));
}

/// Looks at VMs that changed, and walks on through all of them.
fn reconcile_some(txn: &mut Txn<'_>) {
    let dirty = &mut txn.transient().dirty;
    let changed: Vec<VmId> = dirty.iter().take(RECONCILE).copied().collect();
    for id in &changed {
        dirty.remove(id);
    }
    let cursor = txn.transient().cursor;
    let first = cursor.map_or(std::ops::Bound::Unbounded, std::ops::Bound::Excluded);
    let vms = txn.world().vms.range((first, std::ops::Bound::Unbounded));
    let walked: Vec<VmId> = vms.take(RECONCILE).map(|(id, _)| *id).collect();
    txn.transient().cursor = walked.last().copied();
    for id in changed.into_iter().chain(walked) {
        reconcile::vm(txn, id);
    }
}
