//! What a review found: each history with the promise that it broke.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test ends where its promise is broken"
)]

mod cell;

use cell::{Cell, by_name, wanted};
use model::{
    Code, Command, Generation, HostId, OperationId, Receipt, Refusal, Report, Revision, VmId, VmState,
    order::{Happening, OffCause, Verb, VmObserved, VmOrder, VmReport},
};
use uuid::Uuid;

fn inventory(vm: VmId, generation: Generation, revision: Revision, what: Happening) -> Report {
    let vms = vec![VmObserved {
        vm,
        generation,
        revision,
        what,
    }];
    Report::Inventory { vms }
}

fn alarms(cell: &Cell) -> usize {
    let notices = cell.world.notices(model::id::Sequence(0));
    notices.filter(|notice| notice.what == "host.report-ignored").count()
}

fn another(of: HostId, cell: &Cell) -> HostId {
    cell.world.hosts().map(|host| host.id).find(|id| *id != of).unwrap()
}

/// An order that concerns only the other host, with the next number: what it still has of the VM goes away.
fn leftover_elsewhere(cell: &mut Cell, order: &VmOrder, other: HostId) {
    cell.report(
        other,
        inventory(order.vm, Generation(0), Revision(0), Happening::Running),
    );
    let (to, last) = cell.last_order();
    assert_eq!(to, other);
    assert!(matches!(last.verb, Verb::Remove { .. }) && last.revision > order.revision);
}

#[test]
fn an_inventory_that_is_resent_does_not_switch_a_running_vm_off() {
    let mut cell = Cell::of(1);
    cell.ask(Command::CreateVm(wanted("web1"))).unwrap();
    let (at, start) = cell.last_order();
    let off = |revision| {
        let cause = OffCause::Ordered;
        inventory(start.vm, start.generation, revision, Happening::Off { cause })
    };
    let before = Revision(start.revision.0 - 1);
    cell.report(at, off(before));
    cell.answer(at, &start, Happening::Running);
    cell.report(at, off(before));
    assert_eq!(cell.vm("web1").status.state, VmState::Active);
    cell.report(at, off(start.revision));
    assert_eq!(cell.vm("web1").status.state, VmState::Inactive);
}

#[test]
fn a_refused_order_does_not_make_the_next_inventory_an_old_one() {
    let mut cell = Cell::of(1);
    let at = cell.running("web1");
    let (_, start) = cell.last_order();
    cell.ask(Command::PauseVm(by_name("web1"))).unwrap();
    let (_, pause) = cell.last_order();
    let reason = Refusal::new(Code::HostFailed, "the monitor is lost");
    cell.answer(at, &pause, Happening::Refused { reason });
    // The host journals only orders that it accepts.
    let cause = OffCause::Guest;
    cell.report(
        at,
        inventory(start.vm, start.generation, start.revision, Happening::Off { cause }),
    );
    assert_eq!(cell.vm("web1").status.state, VmState::Inactive);
}

#[test]
fn an_order_to_another_host_does_not_hide_that_a_vm_is_deleted() {
    let mut cell = Cell::of(2);
    let at = cell.running("web1");
    cell.ask(Command::DeleteVm(by_name("web1"))).unwrap();
    let (_, remove) = cell.last_order();
    let other = another(at, &cell);
    leftover_elsewhere(&mut cell, &remove, other);
    cell.answer(at, &remove, Happening::Removed);
    assert!(cell.world.vm(remove.vm).is_none());
    let operation = cell.world.operation(remove.operation).unwrap();
    assert_eq!(operation.state.name(), "succeeded");
}

#[test]
fn an_order_to_another_host_does_not_hide_that_a_vm_was_reset() {
    let mut cell = Cell::of(2);
    let at = cell.running("web1");
    cell.ask(Command::RebootVm(by_name("web1"))).unwrap();
    let (_, reboot) = cell.last_order();
    let other = another(at, &cell);
    leftover_elsewhere(&mut cell, &reboot, other);
    cell.answer(at, &reboot, Happening::Rebooted);
    let operation = cell.world.operation(reboot.operation).unwrap();
    assert_eq!(operation.state.name(), "succeeded");
}

#[test]
fn tombstones_of_deleted_vms_are_no_alarm_but_a_process_is() {
    let mut cell = Cell::of(1);
    let host = cell.world.hosts().next().unwrap().id;
    let vm = VmId(Uuid::from_u128(0xdead));
    let tombstones = [
        Happening::TornDown {
            receipt: Box::new(Receipt::default()),
            stopped_at_ms: None,
        },
        Happening::Voided {
            reason: "it gave up".to_owned(),
        },
        Happening::Removed,
    ];
    for what in tombstones {
        cell.report(host, inventory(vm, Generation(1), Revision(3), what.clone()));
        let report = VmReport {
            vm,
            generation: Generation(1),
            revision: Revision(3),
            operation: Some(OperationId(Uuid::from_u128(1))),
            what,
        };
        cell.report(host, Report::Vm(Box::new(report)));
    }
    assert_eq!(alarms(&cell), 0);
    cell.report(host, inventory(vm, Generation(1), Revision(3), Happening::Running));
    assert_eq!(alarms(&cell), 1);
}
