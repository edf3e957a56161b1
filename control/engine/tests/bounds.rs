//! What is bounded and what goes away: agents' texts, records of VMs that have left, deletions that are answered late.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test ends where its promise is broken"
)]

mod cell;

use cell::{Cell, boot, by_name, facts, inventory};
use model::{
    Code, Command, Generation, HostId, Order, Refusal, Report, Revision, VmId, VmState,
    order::{Happening, OffCause, Verb},
};
use uuid::Uuid;

/// Bytes that the world takes as it is stored.
fn size(cell: &Cell) -> usize {
    format!("{:?}", cell.world.rows()).len()
}

#[test]
fn no_text_of_an_agent_is_kept_beyond_its_bound() {
    let mut cell = Cell::of(1);
    let at = cell.running("web1");
    let vm = cell.vm("web1");
    let long = "\u{e4}".repeat(2 << 20);
    let before = size(&cell);
    let die = |detail: String| {
        let cause = OffCause::Died { detail };
        inventory(vm.id, vm.status.generation, Revision(99), Happening::Off { cause })
    };
    cell.report(at, die(long.clone()));
    let reason = cell.vm("web1").status.reason.unwrap();
    assert!(reason.contains("died: \u{e4}") && reason.chars().count() < 1100);
    let mut said = facts(boot(1), &[(cell::SHARED, "shared")]);
    said.agent_version = long.clone();
    said.hypervisor.accelerator_reason = long.clone();
    said.hypervisor.version = long.clone();
    said.hypervisor.machine_types.insert(long.clone());
    said.hypervisor
        .migration
        .extend((0..100_000).map(|n| format!("capability-{n}")));
    cell.report(at, Report::Facts(Box::new(said)));
    cell.ask(Command::StartVm(by_name("web1"))).unwrap();
    let (_, start) = cell.last_order();
    let reason = Refusal::new(Code::HostFailed, long.clone()).hint(long);
    cell.answer(at, &start, Happening::Refused { reason });
    assert_eq!(cell.vm("web1").status.state, VmState::Failed);
    let grown = size(&cell) - before;
    assert!(grown < 64 << 10, "{grown} bytes more");
}

/// The order to forget a VM that a host was just sent.
fn told_to_forget(cell: &Cell, host: HostId) -> model::order::VmOrder {
    let (to, order) = cell.last_order();
    assert!(
        to == host && order.verb == Verb::Remove { volumes: Vec::new() },
        "{order:?}"
    );
    order
}

#[test]
fn a_host_forgets_a_vm_that_was_started_elsewhere_or_deleted() {
    let mut cell = Cell::of(2);
    let first = cell.running("web1");
    let before = cell.vm("web1");
    let off = Happening::Off {
        cause: OffCause::Ordered,
    };
    cell.ask(Command::KillVm(by_name("web1"))).unwrap();
    let (_, kill) = cell.last_order();
    cell.answer(first, &kill, off.clone());
    let seen = || inventory(before.id, before.status.generation, kill.revision, off.clone());
    // Where it was last, it stays known.
    let sent = cell.sent.len();
    cell.report(first, seen());
    assert_eq!(cell.sent.len(), sent);
    let away = Command::SetSchedulable {
        host: model::name::Reference::Id(first.0),
        schedulable: false,
    };
    cell.ask(away).unwrap();
    cell.ask(Command::StartVm(by_name("web1"))).unwrap();
    let (second, start) = cell.last_order();
    assert_ne!(first, second);
    cell.answer(second, &start, Happening::Running);
    cell.report(first, seen());
    let forget = told_to_forget(&cell, first);
    cell.answer(first, &forget, Happening::Removed);
    assert!(cell.world.outbox(first).next().is_none());
    assert_eq!(cell.vm("web1").status.state, VmState::Active);

    cell.ask(Command::DeleteVm(by_name("web1"))).unwrap();
    let (_, delete) = cell.last_order();
    cell.answer(second, &delete, Happening::Removed);
    cell.report(first, seen());
    let forget = told_to_forget(&cell, first);
    assert!(forget.revision > kill.revision);
    cell.answer(first, &forget, Happening::Removed);
    assert!(cell.world.outbox(first).next().is_none());
    // What runs is no record: people look at it.
    let sent = cell.sent.len();
    let unknown = VmId(Uuid::from_u128(0x777));
    cell.report(
        first,
        inventory(unknown, Generation(1), Revision(1), Happening::Running),
    );
    assert_eq!(cell.sent.len(), sent);
}

#[test]
fn a_deletion_that_is_answered_late_deletes_the_vm_and_meanwhile_it_is_not_started() {
    let mut cell = Cell::of(1);
    let at = cell.running("web1");
    cell.ask(Command::KillVm(by_name("web1"))).unwrap();
    let (_, kill) = cell.last_order();
    let cause = OffCause::Ordered;
    cell.answer(at, &kill, Happening::Off { cause });
    let deleting = cell.operate(Command::DeleteVm(by_name("web1")));
    let (_, delete) = cell.last_order();
    cell.tick(200);
    assert_eq!(cell.world.operation(deleting.id).unwrap().state.name(), "failed");
    let kept = cell
        .world
        .outbox(at)
        .any(|order| matches!(&order, Order::Vm(order) if order.revision == delete.revision));
    assert!(kept, "a host that was away carries it out");
    let refusal = cell.ask(Command::StartVm(by_name("web1"))).unwrap_err();
    assert_eq!(refusal.code, Code::WrongState);
    cell.answer(at, &delete, Happening::Removed);
    assert!(cell.world.vms().next().is_none() && cell.world.outbox(at).next().is_none());
}
