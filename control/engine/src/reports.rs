//! What hosts tell of VMs: whether the host may, whether it is news, and what it means.

use model::{
    Code, Generation, HostId, Key, OperationId, OperationKind, OperationState, Order, Refusal, Revision, Stage, Vm,
    VmId, VmState,
    operation::Progress,
    order::{Happening, OffCause, Subject, Verb, VmObserved, VmOrder, VmReport},
};
use uuid::Uuid;

use crate::{hosts, index, lifecycle, moves, reconcile, stranded, templates, txn::Txn, world::World};

/// One host's word about one VM.
struct Said<'r> {
    host: HostId,
    vm: VmId,
    generation: Generation,
    revision: Revision,
    operation: Option<OperationId>,
    what: &'r Happening,
    /// Part of an inventory: how it is now, not how it once became.
    inventory: bool,
    /// It answers an order to delete the VM with its disks.
    deletes: bool,
}

/// How the host that speaks stands to the VM, at the generation of which it speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// It holds it, and is not, or no longer, its source.
    Holder,
    /// It holds it as the source of terms that are open.
    Source,
    /// It held it as the source of the terms.
    FormerSource,
    /// It may get it.
    Destination,
    /// It speaks of a generation that is past.
    Past,
}

/// Something happened to a VM.
pub(crate) fn vm(txn: &mut Txn<'_>, host: HostId, report: &VmReport) {
    hear(
        txn,
        &Said {
            host,
            vm: report.vm,
            generation: report.generation,
            revision: report.revision,
            operation: report.operation,
            what: &report.what,
            inventory: false,
            deletes: false,
        },
    );
}

/// A VM as an agent knows it now: the way of a report.
pub(crate) fn observed(txn: &mut Txn<'_>, host: HostId, observed: &VmObserved) {
    hear(
        txn,
        &Said {
            host,
            vm: observed.vm,
            generation: observed.generation,
            revision: observed.revision,
            operation: None,
            what: &observed.what,
            inventory: true,
            deletes: false,
        },
    );
}

fn hear(txn: &mut Txn<'_>, said: &Said<'_>) {
    let deletes = deletion(txn.world(), said.host, said.vm).is_some_and(|order| order.revision <= said.revision);
    let said = &Said { deletes, ..*said };
    answered(txn, said);
    let Some(vm) = txn.world().vm(said.vm) else {
        // A VM that was deleted: its host says so again, or how an earlier stay ended there.
        if said.inventory && matches!(said.what, Happening::Off { .. }) {
            forget(txn, said, said.revision.next());
        } else if !is_gone(said.what) {
            let detail = format!("it told of VM {}, which is not known; look at that host", said.vm);
            hosts::complain(txn, said.host, detail);
        }
        return;
    };
    if !index::concerned(vm).contains(&said.host) {
        return stranger(txn, said);
    }
    if said.operation.is_some_and(|id| is_of_other_move(txn, said, id)) {
        return;
    }
    let standing = standing(vm, said);
    let stale = said.revision < vm.status.observed;
    let holds = matches!(standing, Standing::Holder | Standing::Source);
    // A refused order is not among those that the host then says it has seen: its next inventory would pass for an old one.
    let counts = holds && !matches!(said.what, Happening::Refused { .. });
    if counts && !stale && said.revision <= vm.status.ordered {
        txn.edit_vm(said.vm, |vm| vm.status.observed = said.revision);
    }
    means(txn, said, standing, stale);
    reconcile::settle_terms(txn, said.vm);
}

/// Whether a host says that nothing of the VM runs there: no reason for an alarm, whatever the world knows of the VM.
const fn is_gone(what: &Happening) -> bool {
    matches!(
        what,
        Happening::Removed | Happening::Off { .. } | Happening::Voided { .. } | Happening::TornDown { .. }
    )
}

/// The outbox keeps an order until its host has answered it, or a later one.
fn answered(txn: &mut Txn<'_>, said: &Said<'_>) {
    let row = txn.world().outbox.get(&(said.host, Subject::Vm(said.vm)));
    let done = row.is_some_and(|row| matches!(&row.order, Order::Vm(order) if order.revision <= said.revision));
    if done {
        txn.delete(Key::Outbox(said.host, Subject::Vm(said.vm)));
    }
}

/// The order to delete a VM with its disks that a host has not answered.
pub(crate) fn deletion(world: &World, host: HostId, vm: VmId) -> Option<&VmOrder> {
    let row = world.outbox.get(&(host, Subject::Vm(vm)))?;
    let Order::Vm(order) = &row.order else { return None };
    // What clears away a copy is on behalf of no operation.
    let deletes = matches!(order.verb, Verb::Remove { .. }) && order.operation != OperationId(Uuid::nil());
    deletes.then_some(order)
}

/// Words of an earlier move between the same hosts do not count for this one.
fn is_of_other_move(txn: &Txn<'_>, said: &Said<'_>, id: OperationId) -> bool {
    let is_move = matches!(
        said.what,
        Happening::Receiving { .. }
            | Happening::Copying
            | Happening::Stopped
            | Happening::Released
            | Happening::Activated { .. }
            | Happening::Voided { .. }
            | Happening::Kept { .. }
            | Happening::Reclaimed { .. }
            | Happening::TornDown { .. }
            | Happening::Unknown { .. }
            | Happening::TooLate
    );
    let terms = txn.world().vm(said.vm).and_then(|vm| vm.status.moving.as_ref());
    is_move && terms.is_none_or(|terms| terms.operation != id)
}

fn standing(vm: &Vm, said: &Said<'_>) -> Standing {
    let status = &vm.status;
    let holds = status.host == Some(said.host) && status.generation == said.generation;
    if let Some(terms) = &status.moving {
        if said.host == terms.source && said.generation == terms.held {
            return if holds {
                Standing::Source
            } else {
                Standing::FormerSource
            };
        }
        if said.host == terms.destination && said.generation == terms.granted {
            return if holds { Standing::Holder } else { Standing::Destination };
        }
    }
    if holds { Standing::Holder } else { Standing::Past }
}

/// A host that the world does not place the VM on: its word changes nothing. What it still has of an earlier generation goes away.
fn stranger(txn: &mut Txn<'_>, said: &Said<'_>) {
    let past = txn
        .world()
        .vm(said.vm)
        .is_some_and(|vm| said.generation < vm.status.generation);
    let gone = is_gone(said.what);
    // What is off takes no memory, but its record, its log and its place in every inventory.
    let is_left = !gone || matches!(said.what, Happening::Off { .. });
    if past && said.inventory && is_left {
        return clear_leftover(txn, said);
    }
    if !past && !gone {
        let detail = format!(
            "it told of VM {} at generation {}, which it does not hold",
            said.vm, said.generation
        );
        hosts::complain(txn, said.host, detail);
    }
}

/// A later generation runs elsewhere, so what this host still has is of no use; its disks are not touched.
fn clear_leftover(txn: &mut Txn<'_>, said: &Said<'_>) {
    if *said.what == Happening::Released {
        // It waits for the other host of terms that are long over, and obeys only what is above them.
        return stranded::remove_above(txn, said.host, said.vm);
    }
    let Some(revision) = txn.world().vm(said.vm).map(|vm| vm.status.ordered.next()) else {
        return;
    };
    txn.edit_vm(said.vm, |vm| vm.status.ordered = revision);
    forget(txn, said, revision);
}

/// Orders a host to forget what it has of a VM. Its disks are not touched.
fn forget(txn: &mut Txn<'_>, said: &Said<'_>, revision: Revision) {
    let epoch = txn.transient().epoch;
    txn.send_kept(
        said.host,
        Order::Vm(Box::new(VmOrder {
            epoch,
            vm: said.vm,
            generation: said.generation,
            revision,
            // On behalf of none: reconciliation asks.
            operation: OperationId(Uuid::nil()),
            verb: Verb::Remove { volumes: Vec::new() },
        })),
    );
}

// tidy: long because it is one table: each word, from each standing
fn means(txn: &mut Txn<'_>, said: &Said<'_>, standing: Standing, stale: bool) {
    use Standing::{Destination, FormerSource, Holder, Source};
    let vm = said.vm;
    match (said.what, standing) {
        (Happening::Running | Happening::Paused, Holder | Source) if !stale || said.inventory => {
            templates::arrived(txn, vm, said.host);
            power(txn, said);
        }
        // Told to give up, it says that it has it.
        (Happening::Running, Destination) => moves::activated(txn, vm, said.revision, None),
        (Happening::Paused, Destination) if moves::arrives_paused(txn, vm) => {
            moves::activated(txn, vm, said.revision, None);
        }
        (Happening::Running, FormerSource) if said.inventory => {
            let detail = format!("it says that it still runs VM {vm}, which has moved away; look at that host at once");
            hosts::complain(txn, said.host, detail);
        }
        (Happening::Off { cause }, Holder) => off(txn, said, cause),
        (Happening::Off { cause }, Source) => {
            if txn.holding(vm).is_some_and(|held| held.migration().is_none()) || is_settled(txn, vm) {
                off(txn, said, cause);
            } else {
                moves::source_off(txn, vm, cause);
            }
        }
        (Happening::Off { .. }, FormerSource) => moves::forgot(txn, vm, said.host, "it is off there"),
        // Nobody orders a destination to stop what it is not known to have: this is an earlier stay, and it takes nothing.
        (
            Happening::Off {
                cause: OffCause::Ordered,
            },
            Destination,
        ) => moves::voided(txn, vm, "it is off there"),
        (Happening::Off { cause }, Destination) => {
            // It ran there, and ended before we heard of it.
            moves::activated(txn, vm, said.revision, None);
            off(txn, said, cause);
        }
        (Happening::Rebooted, Holder | Source) => rebooted(txn, said),
        (Happening::Removed, Holder | Source) => removed(txn, said, standing),
        (Happening::Removed, FormerSource) => moves::forgot(txn, vm, said.host, "nothing of it is there"),
        // In an inventory this may be a container that is still being prepared.
        (Happening::Removed, Destination) if !said.inventory => moves::voided(txn, vm, "nothing of it is there"),
        (Happening::Refused { reason }, _) => refused(txn, said, standing, reason),
        (Happening::Receiving { tunnel_port }, Destination) => moves::receiving(txn, vm, *tunnel_port),
        (Happening::Copying, Source) => moves::reached(txn, vm, Stage::IterativePreCopy),
        (Happening::Stopped, Source) => moves::reached(txn, vm, Stage::StopAndCopy),
        (Happening::Released, Source) => {
            moves::reached(txn, vm, Stage::Commitment);
            stranded::released(txn, vm, said.revision);
        }
        (Happening::Released, FormerSource) => stranded::say_run(txn, vm),
        (Happening::Removed, Standing::Past) if is_above_terms(txn, said) => stranded::removed(txn, vm),
        (Happening::Activated { resumed_at_ms }, Destination) => {
            moves::activated(txn, vm, said.revision, *resumed_at_ms);
        }
        (Happening::Voided { reason }, Destination) => moves::voided(txn, vm, reason),
        (Happening::Kept { reason }, Source) => moves::kept(txn, vm, reason),
        // It has it back, and died before it could say so in as many words.
        (Happening::Running | Happening::Paused | Happening::Off { .. }, Standing::Past)
            if has_reclaimed(txn, said) =>
        {
            moves::reclaimed(txn, vm, said.revision, "the destination could not run it");
            means(txn, said, Holder, stale);
        }
        (Happening::Reclaimed { reason }, Source | Standing::Past) if is_reclaimable(txn, said) => {
            moves::reclaimed(txn, vm, said.revision, reason);
        }
        (Happening::TornDown { receipt, stopped_at_ms }, Source | FormerSource) => {
            moves::torn_down(txn, vm, receipt, *stopped_at_ms);
        }
        (Happening::Unknown { reason }, Source | Destination | FormerSource) => {
            moves::unknown(txn, vm, said.host, reason);
        }
        (Happening::TooLate, Source) => {
            moves::too_late(txn, vm);
            stranded::released(txn, vm, said.revision);
        }
        _ => {}
    }
}

/// Whether the source of earlier terms holds the VM by its own word.
fn is_settled(txn: &Txn<'_>, vm: VmId) -> bool {
    let row = txn.world().vm(vm);
    row.is_some_and(|row| {
        row.operation.is_none() && matches!(row.status.state, VmState::Active | VmState::Paused | VmState::Inactive)
    })
}

/// The source takes the VM back under its old generation or the one that its terms keep for that.
fn is_reclaimable(txn: &Txn<'_>, said: &Said<'_>) -> bool {
    let terms = txn.world().vm(said.vm).and_then(|vm| vm.status.moving.as_ref());
    terms.is_some_and(|terms| {
        said.host == terms.source && (said.generation == terms.held || said.generation == terms.reclaimed)
    })
}

/// The source speaks under the generation that only the destination's `void` gives it.
fn has_reclaimed(txn: &Txn<'_>, said: &Said<'_>) -> bool {
    let Some(vm) = txn.world().vm(said.vm) else {
        return false;
    };
    let terms = vm
        .status
        .moving
        .as_ref()
        .filter(|terms| vm.status.generation == terms.held);
    terms.is_some_and(|terms| said.host == terms.source && said.generation == terms.reclaimed)
}

/// The source answers an order that was given above everything that its terms allow.
fn is_above_terms(txn: &Txn<'_>, said: &Said<'_>) -> bool {
    let terms = txn.world().vm(said.vm).and_then(|vm| vm.status.moving.as_ref());
    terms.is_some_and(|terms| said.host == terms.source && said.generation > terms.reclaimed)
}

/// It runs, or stands, on the host that holds it.
fn power(txn: &mut Txn<'_>, said: &Said<'_>) {
    let Some(vm) = txn.world().vm(said.vm) else { return };
    let held = txn.holding(said.vm);
    let kept = Refusal::new(
        Code::HostFailed,
        format!("VM {} was not moved: its source still has it", vm.name),
    );
    if let Some(migration) = held.and_then(|held| held.migration()) {
        // While it moves the stages tell. But a source that is told to give up, and knows of no move, just says how the VM is.
        let told = migration.cancelling || migration.reason.is_some();
        if told && said.revision >= vm.status.ordered && migration.stage < Stage::Activation {
            moves::kept(txn, said.vm, &kept);
        }
        return;
    }
    // Failed: the other host could not tell; the source can.
    let open = matches!(vm.status.state, VmState::Migrating | VmState::Failed);
    if held.is_none() && vm.status.moving.is_some() && open {
        // An old word that comes twice must not decide who has it: only how it is now, or the answer to the order to give up.
        if said.inventory || said.revision >= vm.status.ordered {
            moves::kept(txn, said.vm, &kept);
        }
        return;
    }
    let is_off = matches!(vm.status.state, VmState::Inactive | VmState::Failed);
    if is_off && !said.inventory {
        // A generation that was seen off never runs again: this is an old word that comes twice.
        return;
    }
    let state = match said.what {
        Happening::Running => VmState::Active,
        _ => VmState::Paused,
    };
    let answers = said.revision >= vm.status.ordered;
    if vm.status.state == VmState::Provisioning && held.is_none() && !answers {
        // Its start was given up: it runs for a moment until the order to end it has come.
        return;
    }
    let done = held.filter(|held| match held.kind {
        OperationKind::CreateVm | OperationKind::StartVm => true,
        OperationKind::ResumeVm | OperationKind::RebootVm => answers && state == VmState::Active,
        OperationKind::PauseVm => answers && state == VmState::Paused,
        _ => false,
    });
    let done = done
        .filter(|held| held.kind != OperationKind::RebootVm || said.inventory)
        .map(|held| held.id);
    txn.edit_vm(said.vm, |vm| {
        vm.status.state = state;
        vm.status.reason = None;
    });
    if let Some(done) = done {
        txn.finish(done, OperationState::Succeeded);
    }
}

/// In which state a VM is left when it ended, and why, for people.
pub(crate) fn off_text(world: &World, vm: &Vm, host: HostId, cause: &OffCause) -> (VmState, String) {
    let host = lifecycle::host_name(world, host);
    let (state, text) = match cause {
        OffCause::Guest => (VmState::Inactive, "its guest powered off".to_owned()),
        OffCause::Ordered => (VmState::Inactive, "it was stopped".to_owned()),
        OffCause::Died { detail } => (VmState::Failed, format!("its process on {host} died: {detail}")),
        OffCause::HostRebooted => (VmState::Inactive, format!("its host {host} rebooted or lost power")),
    };
    let starting = vm.status.state == VmState::Provisioning && vm.operation.is_some();
    (if starting { VmState::Failed } else { state }, text)
}

/// It is off, on the host that held it.
fn off(txn: &mut Txn<'_>, said: &Said<'_>, cause: &OffCause) {
    let world = txn.world();
    let Some(vm) = world.vm(said.vm) else { return };
    let held = txn.holding(said.vm).map(|held| (held.id, held.kind.clone()));
    if !vm.status.state.holds_capacity() {
        return;
    }
    if said.inventory && said.revision < vm.status.observed {
        // An inventory that was resent: since it was made the host has answered a later order.
        return;
    }
    let starting = vm.status.state == VmState::Provisioning && held.is_some();
    if said.inventory && starting && said.revision < vm.status.ordered {
        // Off until the start that is under way is done.
        return;
    }
    let (state, text) = off_text(world, vm, said.host, cause);
    let plain = matches!(cause, OffCause::Ordered);
    let name = vm.name.clone();
    txn.edit_vm(said.vm, |vm| {
        vm.status.state = state;
        vm.status.reason = (!plain).then(|| text.clone());
        // Off by its own word: it never was released under terms that are still open.
        if vm.status.moving.as_ref().is_some_and(|terms| terms.source == said.host) {
            vm.status.cleared.insert(said.host);
        }
    });
    let Some((id, kind)) = held else { return };
    match kind {
        OperationKind::StopVm | OperationKind::KillVm => txn.finish(id, OperationState::Succeeded),
        OperationKind::DeleteVm => {}
        OperationKind::MigrateVm(migration) => {
            // It had moved, and ended there before the source was cleared.
            debug_assert!(migration.stage >= Stage::Activation);
        }
        _ => {
            let message = format!("{} of VM {name} failed: {text}", kind.name());
            let hint = format!("start it: `godwit vm start {name}`");
            txn.fail(id, Refusal::new(Code::HostFailed, message).hint(hint));
        }
    }
}

/// Whether a host answers the order of an operation: it names it, or has seen the newest order about the VM. That one may have
/// gone to another host, so the number alone would miss the answer.
fn answers(said: &Said<'_>, vm: &Vm, operation: OperationId) -> bool {
    said.operation == Some(operation) || said.revision >= vm.status.ordered
}

fn rebooted(txn: &mut Txn<'_>, said: &Said<'_>) {
    let Some(vm) = txn.world().vm(said.vm) else { return };
    let done = txn
        .holding(said.vm)
        .filter(|held| held.kind == OperationKind::RebootVm && answers(said, vm, held.id));
    if let Some(id) = done.map(|held| held.id) {
        txn.finish(id, OperationState::Succeeded);
    }
}

/// Nothing of it is left on its host: the answer to an order to delete it, else it ended there.
fn removed(txn: &mut Txn<'_>, said: &Said<'_>, standing: Standing) {
    let Some(vm) = txn.world().vm(said.vm) else { return };
    let deleting = txn
        .holding(said.vm)
        .filter(|held| held.kind == OperationKind::DeleteVm)
        .map(|held| held.id);
    match deleting {
        Some(id) if answers(said, vm, id) => {
            lifecycle::erase(txn, said.vm);
            txn.finish(id, OperationState::Succeeded);
        }
        Some(_) => {}
        // Its operation was out of time.
        None if said.deletes => lifecycle::erase(txn, said.vm),
        None => {
            let detail = "nothing of it is left there".to_owned();
            let what = Happening::Off {
                cause: OffCause::Died { detail },
            };
            means(txn, &Said { what: &what, ..*said }, standing, false);
        }
    }
}

/// An order could not be done.
fn refused(txn: &mut Txn<'_>, said: &Said<'_>, standing: Standing, reason: &Refusal) {
    if said.operation == Some(OperationId(Uuid::nil())) {
        return stranded::refused(txn, said.host, said.vm, reason);
    }
    let Some(held) = txn.holding(said.vm).filter(|held| said.operation == Some(held.id)) else {
        return;
    };
    let (id, kind) = (held.id, held.kind.clone());
    let host = lifecycle::host_name(txn.world(), said.host);
    match kind {
        OperationKind::MigrateVm(migration) => {
            let terms = &migration.terms;
            if said.host == terms.destination && migration.stage <= Stage::Reservation {
                moves::voided(txn, said.vm, &reason.message);
            } else if said.host == terms.source && standing == Standing::Source && migration.stage < Stage::Commitment {
                moves::kept(txn, said.vm, reason);
            }
        }
        OperationKind::CreateVm | OperationKind::StartVm => {
            let text = format!("{host} could not start it: {}", reason.message);
            txn.edit_vm(said.vm, |vm| {
                vm.status.state = VmState::Failed;
                vm.status.reason = Some(text);
            });
            txn.fail(id, reason.clone());
        }
        _ => txn.fail(id, reason.clone()),
    }
}

/// A host rebooted: what it had in memory is gone, whatever it will say. Orders that it has not seen will still be carried out.
pub(crate) fn host_rebooted(txn: &mut Txn<'_>, host: HostId, vm: VmId) {
    lost(txn, host, vm, &OffCause::HostRebooted, "it rebooted");
}

/// A host knows nothing of a VM that the world places there.
pub(crate) fn not_mentioned(txn: &mut Txn<'_>, host: HostId, vm: VmId) {
    let detail = "the agent there knows nothing of it".to_owned();
    lost(
        txn,
        host,
        vm,
        &OffCause::Died { detail },
        "it knows nothing of the move",
    );
}

fn lost(txn: &mut Txn<'_>, host: HostId, vm: VmId, cause: &OffCause, why: &str) {
    let world = txn.world();
    let Some(row) = world.vm(vm) else { return };
    let waiting = world.outbox.get(&(host, Subject::Vm(vm))).map(|row| &row.order);
    let unseen = waiting.is_some_and(
        |order| matches!(order, Order::Vm(order) if matches!(order.verb, Verb::Start { .. } | Verb::Receive { .. })),
    );
    if unseen && *cause != OffCause::HostRebooted {
        return;
    }
    let terms = row.status.moving.clone();
    let starting = unseen && row.status.state == VmState::Provisioning;
    if row.status.host == Some(host) && !starting {
        let what = Happening::Off { cause: cause.clone() };
        let (generation, revision) = (row.status.generation, row.status.observed);
        let said = Said {
            host,
            vm,
            generation,
            revision,
            operation: None,
            what: &what,
            inventory: true,
            deletes: false,
        };
        let standing = standing(row, &said);
        means(txn, &said, standing, false);
    }
    if terms.is_some_and(|terms| [terms.source, terms.destination].contains(&host)) {
        moves::forgot(txn, vm, host, why);
        if *cause != OffCause::HostRebooted {
            moves::lost_record(txn, vm, host, why);
        }
        // Whatever the terms were, nothing of them is left in its memory.
        let holds = txn.world().vm(vm).is_some_and(|vm| {
            vm.status.host == Some(host) && vm.status.state.holds_capacity() && vm.status.state != VmState::Migrating
        });
        if !holds {
            txn.edit_vm(vm, |vm| vm.status.cleared.extend([host]));
        }
    }
    reconcile::settle_terms(txn, vm);
}

/// How far an operation is: passed on to watchers if it works on a VM or template of that host.
pub(crate) fn progress(txn: &mut Txn<'_>, host: HostId, id: OperationId, progress: Progress) {
    let world = txn.world();
    let Some(operation) = world.operation(id).filter(|operation| !operation.state.is_over()) else {
        return;
    };
    let own = match world.vm(VmId(operation.target.id)) {
        Some(vm) => index::concerned(vm).contains(&host),
        None => crate::templates::imports_of(world, host).contains(&operation.target.name),
    };
    let project = operation.project;
    if own {
        txn.progress(id, project, progress);
    }
}
