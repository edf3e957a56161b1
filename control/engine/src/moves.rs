//! A move under way: what the two agents say, and what it means.
//!
//! ```text
//!            Receiving          Copying  Stopped         Released          Activated          TornDown
//!  Reservation ───▶ IterativePreCopy ───▶ StopAndCopy ───▶ Commitment ───▶ Activation ───▶ Finished
//!      │ Voided          │ Kept               │ Kept          │ Reclaimed       (never back)
//!      └─────────────────┴────────────────────┴───────────────┴──▶ RolledBack
//! ```
//! Reports may come late, twice and in any order between the two hosts; stages only go forward. The destination's `Activated`
//! alone makes it the holder. The source is the holder until then, and again by its own `Kept` or `Reclaimed`.

use model::{
    Code, HostId, Message, Millis, OperationId, OperationState, Order, Receipt, Refusal, Revision, Stage, Terms, VmId,
    VmState,
    migration::{Migration, StageTime},
    operation::Operation,
    order::{Endpoint, OffCause, Relay, Subject, Verb},
};

use crate::{create, hosts, index, lifecycle, reconcile, stranded, templates, txn::Txn};

/// The running operation of a VM's present terms.
fn running(txn: &Txn<'_>, vm: VmId) -> Option<(OperationId, Migration)> {
    let terms = txn.world().vm(vm)?.status.moving.as_ref()?;
    let operation = txn.holding(vm)?;
    let migration = operation
        .migration()
        .filter(|migration| migration.terms.granted == terms.granted)?;
    Some((operation.id, migration.clone()))
}

/// The terms under which a VM is, or was last, moved.
fn terms(txn: &Txn<'_>, vm: VmId) -> Option<Terms> {
    txn.world().vm(vm)?.status.moving.clone()
}

/// Whether the destination of its terms holds the VM.
fn is_over_there(txn: &Txn<'_>, vm: VmId, terms: &Terms) -> bool {
    txn.world()
        .vm(vm)
        .is_some_and(|vm| vm.status.generation == terms.granted)
}

/// Whether the source of its terms still holds the VM, as far as is known.
fn is_still_here(txn: &Txn<'_>, vm: VmId, terms: &Terms) -> bool {
    txn.world().vm(vm).is_some_and(|vm| vm.status.generation == terms.held)
}

/// Whether a VM that moves was paused by its user and is to arrive so.
pub(crate) fn arrives_paused(txn: &Txn<'_>, vm: VmId) -> bool {
    terms(txn, vm).is_some_and(|terms| !terms.run)
}

/// Goes on to a stage, if that is forward.
fn advance(operation: &mut Operation, stage: Stage, now: model::Timestamp) {
    if let Some(migration) = operation.migration_mut()
        && migration.stage < stage
    {
        migration.stage = stage;
        migration.entered.push((stage, now));
    }
}

/// A report says that the move has come to a stage.
pub(crate) fn reached(txn: &mut Txn<'_>, vm: VmId, stage: Stage) {
    let now = txn.now;
    if let Some((id, _)) = running(txn, vm) {
        txn.edit_operation(id, |operation| advance(operation, stage, now));
    }
}

/// The destination's container waits: the source is told to send.
pub(crate) fn receiving(txn: &mut Txn<'_>, vm: VmId, tunnel_port: u16) {
    let Some(terms) = terms(txn, vm) else { return };
    let Some((id, migration)) = running(txn, vm) else {
        // The move was given up meanwhile: the container is not needed.
        if is_still_here(txn, vm, &terms) {
            cancel_once(txn, vm, terms.destination, &terms);
        }
        return;
    };
    let facts = txn
        .world()
        .host(terms.destination)
        .and_then(|host| host.status.facts.as_ref());
    let Some(facts) = facts.filter(|_| migration.stage == Stage::Reservation) else {
        return;
    };
    let to = Endpoint {
        address: facts.address,
        tunnel_port,
        peer_port: facts.peer_port,
    };
    templates::arrived(txn, vm, terms.destination);
    reached(txn, vm, Stage::IterativePreCopy);
    let source = terms.source;
    txn.order(source, vm, id, Verb::Send { terms, to });
}

/// The destination has the VM for good.
pub(crate) fn activated(txn: &mut Txn<'_>, vm: VmId, revision: Revision, resumed_at_ms: Option<i64>) {
    let Some(terms) = terms(txn, vm) else { return };
    if !is_still_here(txn, vm, &terms) {
        return;
    }
    txn.edit_vm(vm, |row| {
        let status = &mut row.status;
        status.host = Some(terms.destination);
        status.generation = terms.granted;
        status.state = if terms.run { VmState::Active } else { VmState::Paused };
        status.reason = None;
        // Revisions are counted over both hosts: from now on what the new host has answered counts.
        status.observed = revision;
        status.cleared.remove(&terms.destination);
    });
    create::bind(txn, vm, terms.destination);
    let Some((id, migration)) = running(txn, vm) else {
        reconcile::settle_terms(txn, vm);
        return;
    };
    txn.edit_operation(id, |operation| {
        if let Some(migration) = operation.migration_mut() {
            migration.resumed_at_ms = resumed_at_ms;
        }
    });
    reached(txn, vm, Stage::Activation);
    if migration.receipt.is_some() {
        finish(txn, vm, id);
    }
}

/// Nothing is left on the source.
pub(crate) fn torn_down(txn: &mut Txn<'_>, vm: VmId, receipt: &Receipt, stopped_at_ms: Option<i64>) {
    let Some(terms) = terms(txn, vm) else { return };
    let known = running(txn, vm);
    let id = terms.operation;
    let created = txn.world().operation(id).map(|operation| operation.created_at);
    txn.edit_operation(id, |operation| {
        if let Some(migration) = operation.migration_mut()
            && migration.receipt.is_none()
        {
            migration.receipt = Some(receipt.clone());
            migration.stopped_at_ms = stopped_at_ms;
        }
    });
    clear(txn, vm, terms.source);
    if !is_over_there(txn, vm, &terms) {
        // The source has learnt from the destination what we have not: wait for the destination's own word.
        return;
    }
    if known.is_some() {
        finish(txn, vm, id);
    } else if let Some(created) = created {
        measure(txn, id, created);
    }
    reconcile::settle_terms(txn, vm);
}

/// A host of the terms has nothing left of the VM.
fn clear(txn: &mut Txn<'_>, vm: VmId, host: HostId) {
    txn.edit_vm(vm, |vm| vm.status.cleared.extend([host]));
}

/// The move is over: the receipt is completed with what only the controller knows.
pub(crate) fn finish(txn: &mut Txn<'_>, vm: VmId, id: OperationId) {
    let now = txn.now;
    let created = txn.world().operation(id).map_or(now, |operation| operation.created_at);
    txn.edit_operation(id, |operation| advance(operation, Stage::Finished, now));
    measure(txn, id, created);
    txn.finish(id, OperationState::Succeeded);
    reconcile::settle_terms(txn, vm);
}

fn measure(txn: &mut Txn<'_>, id: OperationId, created: model::Timestamp) {
    let now = txn.now;
    txn.edit_operation(id, |operation| {
        let Some(migration) = operation.migration_mut() else {
            return;
        };
        let entered = all_stages(&migration.entered, migration.stopped_at_ms, now);
        let running = entered.iter().find(|(stage, _)| *stage == Stage::Activation);
        let between = migration.resumed_at_ms.zip(migration.stopped_at_ms);
        let Some(receipt) = &mut migration.receipt else { return };
        receipt.request_to_running_ms = running.map_or(0, |(_, at)| at.since(created).0);
        receipt.total_ms = now.since(created).0;
        receipt.stop_to_resume_ms = between.map(|(resumed, stopped)| resumed.saturating_sub(stopped));
        receipt.stages = stage_times(&entered, created, now);
    });
}

/// The stages that a finished move went through, each with its beginning. A report may have been overtaken by a later one, or have come
/// long after what it tells: the standstill begins when the source says that its guest stood, as far as that fits between the stages
/// around it (clocks of hosts differ). A stage of which nobody told took no time.
fn all_stages(
    entered: &[(Stage, model::Timestamp)],
    stopped_at_ms: Option<i64>,
    now: model::Timestamp,
) -> Vec<(Stage, model::Timestamp)> {
    const ALL: [Stage; 6] = [
        Stage::PreMigration,
        Stage::Reservation,
        Stage::IterativePreCopy,
        Stage::StopAndCopy,
        Stage::Commitment,
        Stage::Activation,
    ];
    let at = |stage| entered.iter().find(|(of, _)| *of == stage).map(|(_, at)| *at);
    let mut stages = Vec::with_capacity(ALL.len() + 1);
    let mut next = at(Stage::Finished).unwrap_or(now);
    stages.push((Stage::Finished, next));
    for stage in ALL.into_iter().rev() {
        let told = at(stage).unwrap_or(next).min(next);
        let begins = match (stage, stopped_at_ms) {
            (Stage::StopAndCopy, Some(stopped)) => {
                let copying = at(Stage::IterativePreCopy).unwrap_or(next).min(next);
                model::Timestamp(stopped).clamp(copying, next)
            }
            _ => told,
        };
        next = begins;
        stages.push((stage, begins));
    }
    stages.reverse();
    stages
}

fn stage_times(
    entered: &[(Stage, model::Timestamp)],
    created: model::Timestamp,
    now: model::Timestamp,
) -> Vec<StageTime> {
    let ends = entered.iter().skip(1).map(|(_, at)| *at).chain([now]);
    let times = entered.iter().zip(ends).filter(|((stage, _), _)| !stage.is_last());
    times
        .map(|((stage, at), end)| StageTime {
            stage: *stage,
            started_ms: at.since(created).0,
            duration_ms: end.since(*at).0,
        })
        .collect()
}

/// The source kept the VM: the move is rolled back, and the destination told to clear away.
pub(crate) fn kept(txn: &mut Txn<'_>, vm: VmId, reason: &Refusal) {
    let Some(terms) = terms(txn, vm) else { return };
    let off = txn
        .world()
        .vm(vm)
        .is_some_and(|row| row.status.cleared.contains(&terms.source));
    if !is_still_here(txn, vm, &terms) {
        return;
    }
    let running = running(txn, vm);
    if off {
        // It ended there, and now says that it was never released: the destination needs not be asked.
        if let Some((id, migration)) = running {
            roll_back(txn, id, &migration, reason.clone());
            reconcile::settle_terms(txn, vm);
        }
        return;
    }
    if running.is_none() && !is_unsettled(txn, vm) {
        return;
    }
    txn.edit_vm(vm, |row| {
        row.status.state = if terms.run { VmState::Active } else { VmState::Paused };
        row.status.reason = None;
    });
    if let Some((id, migration)) = running {
        roll_back(txn, id, &migration, reason.clone());
    }
    cancel_once(txn, vm, terms.destination, &terms);
    reconcile::settle_terms(txn, vm);
}

/// Whether it is open who holds a VM, and no operation waits for the answer.
fn is_unsettled(txn: &Txn<'_>, vm: VmId) -> bool {
    let row = txn.world().vm(vm);
    row.is_some_and(|row| {
        row.status.moving.is_some()
            && row.operation.is_none()
            && matches!(row.status.state, VmState::Migrating | VmState::Failed)
    })
}

/// Ends the operation of a move that did not take place.
fn roll_back(txn: &mut Txn<'_>, id: OperationId, migration: &Migration, reason: Refusal) {
    let now = txn.now;
    txn.edit_operation(id, |operation| {
        advance(operation, Stage::RolledBack, now);
        if let Some(migration) = operation.migration_mut() {
            migration.reason.get_or_insert_with(|| reason.message.clone());
        }
    });
    if migration.cancelling {
        txn.finish(id, OperationState::Cancelled);
    } else {
        txn.fail(id, reason);
    }
}

/// Gives up a move of which the source knows nothing yet.
pub(crate) fn withdraw(txn: &mut Txn<'_>, vm: VmId, reason: &Refusal) {
    kept(txn, vm, reason);
}

/// Tells a host to give the hand-over up, unless it was told already or has nothing left of it.
fn cancel_once(txn: &mut Txn<'_>, vm: VmId, host: HostId, terms: &Terms) {
    let world = txn.world();
    let cleared = world.vm(vm).is_none_or(|row| row.status.cleared.contains(&host));
    let waiting = world.outbox.get(&(host, Subject::Vm(vm)));
    let told = waiting.is_some_and(|row| {
        let Order::Vm(order) = &row.order else { return false };
        matches!(&order.verb, Verb::Cancel { terms: of } if of.granted == terms.granted)
    });
    if !cleared && !told {
        let terms = terms.clone();
        txn.order(host, vm, terms.operation, Verb::Cancel { terms });
    }
}

/// Tells the source to give the hand-over up.
pub(crate) fn cancel_at_source(txn: &mut Txn<'_>, vm: VmId) {
    if let Some(terms) = terms(txn, vm) {
        cancel_once(txn, vm, terms.source, &terms);
    }
}

/// The destination will never have the VM under these terms.
pub(crate) fn voided(txn: &mut Txn<'_>, vm: VmId, why: &str) {
    let Some(terms) = terms(txn, vm) else { return };
    if !is_still_here(txn, vm, &terms) {
        return;
    }
    let world = txn.world();
    let (name, host) = (lifecycle::host_name(world, terms.destination), terms.destination);
    let source_off = world
        .vm(vm)
        .is_some_and(|row| row.status.cleared.contains(&terms.source));
    let known = world.vm(vm).is_some_and(|row| row.status.cleared.contains(&host));
    let vm_name = world.vm(vm).map_or_else(String::new, |row| row.name.to_string());
    clear(txn, vm, host);
    if !known {
        stranded::begin(txn, vm);
    }
    if let Some((id, migration)) = running(txn, vm) {
        let message = format!("VM {vm_name} was not moved: {name} did not take it: {why}");
        txn.edit_operation(id, |operation| {
            if let Some(migration) = operation.migration_mut() {
                migration.reason.get_or_insert_with(|| message.clone());
            }
        });
        let reason = migration.reason.clone().unwrap_or(message);
        let reason = Refusal::new(Code::HostFailed, reason).hint("ask again, or choose another host");
        if source_off {
            roll_back(txn, id, &migration, reason);
        } else if migration.stage == Stage::Reservation {
            kept(txn, vm, &reason);
        } else if migration.stage < Stage::Commitment {
            cancel_once(txn, vm, terms.source, &terms);
        }
        // Once released, the source takes it back by itself when it learns of this, and says so.
    }
    reconcile::settle_terms(txn, vm);
}

/// The source has the VM back after the destination declined.
pub(crate) fn reclaimed(txn: &mut Txn<'_>, vm: VmId, revision: Revision, why: &str) {
    let Some(terms) = terms(txn, vm) else { return };
    if !is_still_here(txn, vm, &terms) {
        return;
    }
    let running = running(txn, vm);
    txn.edit_vm(vm, |row| {
        let status = &mut row.status;
        status.host = Some(terms.source);
        status.generation = terms.reclaimed;
        status.state = if terms.run { VmState::Active } else { VmState::Paused };
        status.reason = None;
        status.observed = revision;
        status.cleared.remove(&terms.source);
        status.cleared.insert(terms.destination);
    });
    create::bind(txn, vm, terms.source);
    if let Some((id, migration)) = running {
        let world = txn.world();
        let (from, to) = (
            lifecycle::host_name(world, terms.source),
            lifecycle::host_name(world, terms.destination),
        );
        let message = format!("{from} has the VM back: {to} declined it: {why}");
        let reason = Refusal::new(Code::HostFailed, message).hint("ask again, or choose another host");
        roll_back(txn, id, &migration, reason);
    }
    reconcile::settle_terms(txn, vm);
}

/// The VM ended on the source before it was known to be released. Only the destination can tell whether it has it: it is told to
/// give up, and its answer ends the operation.
pub(crate) fn source_off(txn: &mut Txn<'_>, vm: VmId, cause: &OffCause) {
    let Some(terms) = terms(txn, vm) else { return };
    let world = txn.world();
    let Some(row) = world.vm(vm).filter(|row| !row.status.cleared.contains(&terms.source)) else {
        return;
    };
    let (state, text) = crate::reports::off_text(world, row, terms.source, cause);
    let destination_clear = row.status.cleared.contains(&terms.destination);
    let name = row.name.clone();
    txn.withdraw(terms.source, vm);
    txn.edit_vm(vm, |row| {
        row.status.state = state;
        row.status.reason = Some(text.clone());
        row.status.cleared.insert(terms.source);
    });
    if let Some((id, migration)) = running(txn, vm) {
        let message = format!("VM {name} ended while it was moved: {text}");
        txn.edit_operation(id, |operation| {
            if let Some(migration) = operation.migration_mut() {
                migration.reason = Some(message.clone());
            }
        });
        if destination_clear {
            let reason = Refusal::new(Code::HostFailed, message).hint(format!("start it: `godwit vm start {name}`"));
            roll_back(txn, id, &migration, reason);
        }
    }
    cancel_once(txn, vm, terms.destination, &terms);
    reconcile::settle_terms(txn, vm);
}

/// A host cannot tell from its journal who has the VM: nothing starts before both hosts are clear.
pub(crate) fn unknown(txn: &mut Txn<'_>, vm: VmId, host: HostId, why: &str) {
    let Some(terms) = terms(txn, vm) else { return };
    if !is_still_here(txn, vm, &terms) {
        let detail = format!("it cannot tell who has VM {vm}: {why}; the other host does");
        hosts::complain(txn, host, detail);
        return;
    }
    let running = running(txn, vm);
    let state = txn.world().vm(vm).map(|row| row.status.state);
    let kept = running.is_none() && !matches!(state, Some(VmState::Migrating | VmState::Failed));
    let unsent = running
        .as_ref()
        .is_some_and(|(_, migration)| migration.stage <= Stage::Reservation);
    if host == terms.destination && unsent {
        return voided(txn, vm, why);
    }
    if host == terms.destination && kept {
        // The source never gave it up: the destination, which has rebooted since, cannot have run it and has nothing of it.
        clear(txn, vm, host);
        reconcile::settle_terms(txn, vm);
        return;
    }
    let name = lifecycle::host_name(txn.world(), host);
    let text = format!("{name} cannot tell whether its last move took place: {why}");
    txn.edit_vm(vm, |row| {
        row.status.state = VmState::Failed;
        row.status.reason = Some(text.clone());
    });
    if let Some((id, _)) = running {
        let hint = "reboot both hosts of the move, or let both agents connect and tell; then start the VM";
        txn.fail(id, Refusal::new(Code::HostFailed, text).hint(hint));
    }
    if host == terms.destination && state != Some(VmState::Failed) {
        stranded::begin(txn, vm);
    }
    reconcile::settle_terms(txn, vm);
}

/// The destination has rebooted since and has no record of the terms: after the release it cannot tell who has the VM.
pub(crate) fn lost_record(txn: &mut Txn<'_>, vm: VmId, host: HostId, why: &str) {
    let Some(terms) = terms(txn, vm).filter(|terms| host == terms.destination) else {
        return;
    };
    let facts = txn.world().host(host).and_then(|host| host.status.facts.as_ref());
    let rebooted = facts.is_some_and(|facts| facts.boot != terms.destination_boot);
    let released = match running(txn, vm) {
        Some((_, migration)) => migration.stage >= Stage::Commitment,
        None => is_unsettled(txn, vm),
    };
    if rebooted && released && is_still_here(txn, vm, &terms) {
        unknown(txn, vm, host, why);
    }
}

/// A cancel came after the release: the move goes on.
pub(crate) fn too_late(txn: &mut Txn<'_>, vm: VmId) {
    let Some((id, migration)) = running(txn, vm) else {
        return;
    };
    reached(txn, vm, Stage::Commitment);
    if migration.cancelling {
        txn.edit_operation(id, |operation| {
            if let Some(migration) = operation.migration_mut() {
                migration.cancelling = false;
            }
        });
        if let Some(vm) = txn.world().vm(vm).cloned() {
            let detail = "the VM was released already; the move goes on".to_owned();
            txn.notice_vm(&vm, "operation.too-late", detail);
        }
    }
}

/// A host of the terms rebooted or knows nothing of the VM any more.
pub(crate) fn forgot(txn: &mut Txn<'_>, vm: VmId, host: HostId, why: &str) {
    let Some(terms) = terms(txn, vm) else { return };
    if host == terms.destination && is_still_here(txn, vm, &terms) {
        voided(txn, vm, why);
    } else if host == terms.source && is_over_there(txn, vm, &terms) {
        let known = running(txn, vm);
        clear(txn, vm, host);
        if let Some((id, _)) = known {
            finish(txn, vm, id);
        }
        reconcile::settle_terms(txn, vm);
    }
}

/// The operation of a move is out of time.
pub(crate) fn expire(txn: &mut Txn<'_>, id: OperationId, vm: VmId, migration: &Migration) {
    let terms = &migration.terms;
    let world = txn.world();
    let name = world.vm(vm).map_or_else(String::new, |row| row.name.to_string());
    let (from, to) = (
        lifecycle::host_name(world, terms.source),
        lifecycle::host_name(world, terms.destination),
    );
    let allowed = Millis(terms.deadline.0 + terms.settle.0);
    match migration.stage {
        Stage::Activation => {
            let detail = format!("{from} has not said that it has cleared away; it will when it is connected again");
            if let Some(row) = world.vm(vm).cloned() {
                txn.notice_vm(&row, "vm.residue", detail);
            }
            finish(txn, vm, id);
        }
        Stage::PreMigration | Stage::Reservation => {
            let message = format!("VM {name} was not moved: {to} was not ready within {allowed}");
            let reason = Refusal::new(Code::TimedOut, message).hint("look at that host, or choose another");
            if world
                .vm(vm)
                .is_some_and(|row| row.status.cleared.contains(&terms.source))
            {
                roll_back(txn, id, migration, reason);
            } else {
                kept(txn, vm, &reason);
            }
        }
        _ => {
            let message = format!("VM {name}: neither {from} nor {to} has said within {allowed} who has it");
            let hint = "it goes on where it is; let their agents connect and tell";
            txn.edit_vm(vm, |row| {
                if row.status.state == VmState::Migrating {
                    row.status.reason = Some(message.clone());
                }
            });
            // The source's answer counts if it answers the newest order, so it is told last.
            cancel_once(txn, vm, terms.destination, terms);
            cancel_once(txn, vm, terms.source, terms);
            txn.fail(id, Refusal::new(Code::TimedOut, message).hint(hint));
            reconcile::settle_terms(txn, vm);
        }
    }
}

/// Passes a word on to the other agent, if the VM's stored terms name both.
pub(crate) fn relay(txn: &mut Txn<'_>, host: HostId, relay: Relay) {
    let terms = terms(txn, relay.vm).filter(|terms| terms.granted == relay.granted);
    let ends = terms.as_ref().map(|terms| [terms.source, terms.destination]);
    let fits = ends.is_some_and(|[a, b]| [(a, b), (b, a)].contains(&(relay.from, relay.to)));
    if relay.from == host && fits {
        txn.send(relay.to, Order::Relay(relay));
        if relay.message == Message::Release && terms.is_some_and(|terms| terms.source == host) {
            stranded::heard(txn, relay.vm);
        }
        return;
    }
    let concerned = txn
        .world()
        .vm(relay.vm)
        .is_some_and(|vm| index::concerned(vm).contains(&host));
    if relay.from != host || !concerned {
        let detail = format!(
            "it wanted to pass on a word about VM {}, which is not its own",
            relay.vm
        );
        hosts::complain(txn, host, detail);
    }
}
