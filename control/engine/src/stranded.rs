//! A source that has released a VM and waits for a destination that lost its record: who answers it, and when its copy goes away.
//!
//! ```text
//!  source Released ── Release ──▶ destination Unknown (it lost power before its record was synced, and says nothing)
//!        │                           │
//!        │ it had said `Activated`:  │ it never did: Failed, and its new boot proves that nothing runs there
//!        ▼                           ▼
//!  Run, on its behalf          Cancel ─▶ TooLate ─▶ Remove above `reclaimed` ─▶ Removed: both are clear, it may start anew
//! ```
//! The copy goes only by a word that the source gave after the destination was known to be of no help: the answer to the newest
//! order. A word that was resent might be older than a `Void` that gave the source its VM back.

use model::{
    HostId, Message, Millis, OperationId, Order, Refusal, Revision, Terms, VmId, VmState,
    order::{Relay, Subject, Verb, VmOrder},
};
use uuid::Uuid;

use crate::{lifecycle, moves, reconcile, txn::Txn};

/// How long a host is left alone that refused to clear away for the first time; then twice as long each time.
const AGAIN: Millis = Millis::seconds(2);
/// The longest such pause.
const AGAIN_MAX: Millis = Millis::seconds(60);

/// The terms of a VM whose source may wait for ever: the destination cannot tell, and nothing of the VM runs there.
fn terms(txn: &Txn<'_>, vm: VmId) -> Option<Terms> {
    let world = txn.world();
    let status = &world.vm(vm)?.status;
    let terms = status.moving.as_ref()?;
    let destination = world.host(terms.destination);
    // One that was removed never tells any more; a person has said that it is gone for good.
    let boot = destination.map(|host| host.status.facts.as_ref().map(|facts| facts.boot));
    let rebooted = boot.is_none_or(|boot| boot.is_some_and(|boot| boot != terms.destination_boot));
    let cannot_tell = match status.state {
        VmState::Failed => true,
        VmState::Migrating => destination.is_none(),
        _ => false,
    };
    let cleared = |host| status.cleared.contains(host);
    let here = status.generation == terms.held && cleared(&terms.destination) && !cleared(&terms.source);
    (here && rebooted && cannot_tell).then(|| terms.clone())
}

/// The destination has become of no help: the source is asked where it is. Whatever it answered before does not count.
pub(crate) fn begin(txn: &mut Txn<'_>, vm: VmId) {
    if let Some(terms) = terms(txn, vm) {
        let (source, operation) = (terms.source, terms.operation);
        txn.order(source, vm, operation, Verb::Cancel { terms });
    }
}

/// A host refused to clear away what it has of a VM: asked again, ever more seldom, and people are told.
pub(crate) fn refused(txn: &mut Txn<'_>, host: HostId, vm: VmId, reason: &Refusal) {
    let times = txn.transient().refusals.get(&vm).map_or(0, |(times, _)| *times);
    let pause = Millis((AGAIN.0 << times.min(10)).min(AGAIN_MAX.0));
    let until = txn.now.after(pause);
    txn.transient().refusals.insert(vm, (times.saturating_add(1), until));
    let host = lifecycle::host_name(txn.world(), host);
    let message = &reason.message;
    let text = format!("{host} refuses to clear away what it has of it, and is asked again after {pause}: {message}");
    txn.edit_vm(vm, |vm| vm.status.reason = Some(text));
}

/// Whether its source is left alone for now.
fn is_left_alone(txn: &mut Txn<'_>, vm: VmId) -> bool {
    let now = txn.now;
    let refusals = &txn.transient().refusals;
    refusals.get(&vm).is_some_and(|(_, until)| now < *until)
}

/// The source says that it has released the VM.
pub(crate) fn released(txn: &mut Txn<'_>, vm: VmId, seen: Revision) {
    if is_left_alone(txn, vm) {
        return;
    }
    let newest = txn.world().vm(vm).is_some_and(|vm| seen >= vm.status.ordered);
    match terms(txn, vm) {
        Some(terms) if is_removing(txn, vm, &terms) => {}
        Some(terms) if newest => remove_above(txn, terms.source, vm),
        Some(_) => moves::cancel_at_source(txn, vm),
        None => {}
    }
}

/// The source says to the destination that it has released the VM: answered for a destination that may have forgotten.
pub(crate) fn heard(txn: &mut Txn<'_>, vm: VmId) {
    match terms(txn, vm) {
        Some(_) if is_left_alone(txn, vm) => {}
        Some(terms) if is_removing(txn, vm, &terms) => {}
        Some(_) => moves::cancel_at_source(txn, vm),
        None => say_run(txn, vm),
    }
}

/// Tells the source what the destination had told us before it forgot: that it has the VM.
pub(crate) fn say_run(txn: &mut Txn<'_>, vm: VmId) {
    let Some(status) = txn.world().vm(vm).map(|vm| &vm.status) else {
        return;
    };
    let over_there = |terms: &&Terms| status.generation == terms.granted;
    let Some(terms) = status.moving.as_ref().filter(over_there) else {
        return;
    };
    let (to, word) = (
        terms.source,
        Relay {
            vm,
            granted: terms.granted,
            from: terms.destination,
            to: terms.source,
            message: Message::Run,
        },
    );
    txn.send(to, Order::Relay(word));
}

/// Whether the source has been told to clear away, and has not answered.
fn is_removing(txn: &Txn<'_>, vm: VmId, terms: &Terms) -> bool {
    let waiting = txn.world().outbox.get(&(terms.source, Subject::Vm(vm)));
    waiting.is_some_and(|row| matches!(&row.order, Order::Vm(order) if matches!(order.verb, Verb::Remove { .. })))
}

/// Orders a host to clear away what it has of a VM, under a generation that is above every one that was ever given. Its disks are
/// not touched.
pub(crate) fn remove_above(txn: &mut Txn<'_>, host: HostId, vm: VmId) {
    let Some(status) = txn.world().vm(vm).map(|vm| &vm.status) else {
        return;
    };
    let (generation, revision) = (status.highest.next(), status.ordered.next());
    let epoch = txn.transient().epoch;
    txn.edit_vm(vm, |vm| {
        vm.status.highest = generation;
        vm.status.ordered = revision;
    });
    txn.send_kept(
        host,
        Order::Vm(Box::new(VmOrder {
            epoch,
            vm,
            generation,
            revision,
            // On behalf of none: reconciliation asks.
            operation: OperationId(Uuid::nil()),
            verb: Verb::Remove { volumes: Vec::new() },
        })),
    );
}

/// Nothing is left on the source either: the VM may start anew.
pub(crate) fn removed(txn: &mut Txn<'_>, vm: VmId) {
    let Some(terms) = terms(txn, vm) else { return };
    txn.transient().refusals.remove(&vm);
    txn.edit_vm(vm, |vm| {
        vm.status.state = VmState::Failed;
        vm.status.reason = Some("its memory was lost in a move; start it anew".to_owned());
        vm.status.cleared.insert(terms.source);
    });
    reconcile::settle_terms(txn, vm);
}
