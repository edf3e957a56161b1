//! What the engine promises, one test a promise.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test ends where its promise is broken"
)]

mod cell;

use std::collections::BTreeMap;

use cell::{Cell, PROJECT, admin, boot, by_name, facts, host, migrate, moving, name, wanted};
use model::{
    Code, Command, Effect, Event, Mac, Millis, Order, Outcome, Receipt, Refusal, Report, Role, Row, Stage, VmSpec,
    VmState,
    host::Link,
    migration::Message,
    order::{Happening, OffCause, Relay, Verb, VmObserved, VmReport},
    query::{Page, Query, View},
};
use uuid::Uuid;

#[test]
fn a_vm_is_created_where_there_is_most_room_with_its_address_and_disk() {
    let mut cell = Cell::of(2);
    let first = cell.running("web1");
    let second = cell.running("web2");
    assert_ne!(first, second);
    let vm = cell.vm("web1");
    assert_eq!(
        (vm.status.state, vm.status.generation.0, vm.volumes.len()),
        (VmState::Active, 1, 1)
    );
    let port = cell.world.ports().find(|port| port.vm == Some(vm.id)).unwrap();
    // .0 is the network, .1 the gateway.
    assert_eq!(
        (port.ip.to_string().as_str(), port.mac),
        ("10.91.0.2", Mac::of_port(port.id))
    );
    assert_eq!(port.bound, Some(first));
}

#[test]
fn out_of_bounds_requests_are_refused_with_what_would_be_right() {
    let mut cell = Cell::of(1);
    for (vcpus, memory_mib, disk_bytes) in [
        (0, 512, None),
        (65, 512, None),
        (1, 63, None),
        (1, u64::MAX, None),
        (1, 512, Some(7)),
        (1, 512, Some(u64::MAX)),
    ] {
        let mut create = wanted("web1");
        (create.vcpus, create.memory_mib, create.disk_bytes) = (vcpus, memory_mib, disk_bytes);
        let refusal = cell.ask(Command::CreateVm(create)).unwrap_err();
        assert!(
            refusal.code == Code::InvalidInput && !refusal.hint.is_empty(),
            "{refusal:?}"
        );
    }
}

#[test]
fn the_same_request_twice_is_the_same_operation_and_another_body_is_refused() {
    let mut cell = Cell::of(1);
    let Outcome::Operation(first) = cell.keyed(Command::CreateVm(wanted("web1")), "k", 1).unwrap() else {
        panic!()
    };
    let Outcome::Operation(again) = cell.keyed(Command::CreateVm(wanted("web1")), "k", 1).unwrap() else {
        panic!()
    };
    assert_eq!(first.id, again.id);
    assert_eq!(
        cell.keyed(Command::CreateVm(wanted("web2")), "k", 2).unwrap_err().code,
        Code::KeyReused
    );
    cell.tick(25 * 3600);
    assert!(
        cell.keyed(Command::CreateVm(wanted("web3")), "k", 3).is_ok(),
        "a key is forgotten after a day"
    );
}

#[test]
fn roles_and_projects_hide_and_forbid() {
    let mut cell = Cell::of(1);
    cell.running("web1");
    let id = cell.vm("web1").id;
    let mut request = cell.request(Command::KillVm(by_name("web1")));
    request.actor.role = Role::Viewer;
    assert_eq!(cell.submit(request).unwrap_err().code, Code::Forbidden);
    let mut project = cell.world.project(PROJECT).unwrap().clone();
    project.id.0 = Uuid::from_u128(77);
    project.name = name("other");
    project.used = Default::default();
    cell.world.apply(model::Change::Put(Row::Project(project.clone())));
    let mut request = cell.request(Command::KillVm(by_name(&id.to_string())));
    request.actor.project = project.id;
    assert_eq!(cell.submit(request).unwrap_err().code, Code::NotFound);
}

#[test]
fn a_stale_revision_is_refused() {
    let mut cell = Cell::of(1);
    cell.running("web1");
    let mut request = cell.request(Command::PauseVm(by_name("web1")));
    request.expect = Some(cell.revision("web1").next());
    assert_eq!(cell.submit(request).unwrap_err().code, Code::Stale);
}

#[test]
fn exactly_the_quota_succeeds() {
    let mut cell = Cell::of(2);
    let mut project = cell.world.project(PROJECT).unwrap().clone();
    project.quota.vms = Some(3);
    cell.world.apply(model::Change::Put(Row::Project(project)));
    let answers: Vec<_> = (0..6)
        .map(|n| cell.ask(Command::CreateVm(wanted(&format!("vm{n}")))))
        .collect();
    assert_eq!(answers.iter().filter(|answer| answer.is_ok()).count(), 3);
    assert_eq!(answers[5].as_ref().unwrap_err().code, Code::QuotaExceeded);
}

#[test]
fn one_operation_holds_a_vm_and_the_refusal_names_it() {
    let mut cell = Cell::of(2);
    cell.running("web1");
    let operation = cell.operate(migrate("web1"));
    let refusal = cell.ask(migrate("web1")).unwrap_err();
    assert!(refusal.code == Code::Busy && refusal.message.contains(&operation.id.to_string()));
    assert_eq!(
        cell.ask(Command::DeleteVm(by_name("web1"))).unwrap_err().code,
        Code::Busy
    );
}

#[test]
fn each_verb_is_legal_where_its_doc_says_and_idempotent_where_it_is_done() {
    let mut cell = Cell::of(1);
    cell.running("web1");
    let verb = |name: &str| match name {
        "start" => Command::StartVm(by_name("web1")),
        "stop" => Command::StopVm {
            vm: by_name("web1"),
            grace: Millis(0),
        },
        "kill" => Command::KillVm(by_name("web1")),
        "reboot" => Command::RebootVm(by_name("web1")),
        "pause" => Command::PauseVm(by_name("web1")),
        _ => Command::ResumeVm(by_name("web1")),
    };
    for done in ["start", "resume"] {
        assert_eq!(
            cell.operate(verb(done)).state.name(),
            "succeeded",
            "{done} of an active VM"
        );
    }
    cell.ask(verb("pause")).unwrap();
    let (at, order) = cell.last_order();
    cell.answer(at, &order, Happening::Paused);
    assert_eq!(cell.operate(verb("pause")).state.name(), "succeeded");
    for illegal in ["start", "reboot"] {
        assert_eq!(
            cell.ask(verb(illegal)).unwrap_err().code,
            Code::WrongState,
            "{illegal} of a paused VM"
        );
    }
    cell.ask(verb("kill")).unwrap();
    let (at, order) = cell.last_order();
    cell.answer(
        at,
        &order,
        Happening::Off {
            cause: OffCause::Ordered,
        },
    );
    for done in ["stop", "kill"] {
        assert_eq!(
            cell.operate(verb(done)).state.name(),
            "succeeded",
            "{done} of an inactive VM"
        );
    }
    for illegal in ["pause", "resume", "reboot"] {
        assert_eq!(
            cell.ask(verb(illegal)).unwrap_err().code,
            Code::WrongState,
            "{illegal} of an inactive VM"
        );
    }
    let before = cell.vm("web1").status.highest;
    cell.ask(verb("start")).unwrap();
    assert!(
        cell.vm("web1").status.generation > before,
        "a start takes a fresh generation"
    );
}

#[test]
fn a_deleted_vm_frees_its_quota_and_its_address_rests_for_a_minute() {
    let mut cell = Cell::of(1);
    cell.running("web1");
    cell.ask(Command::DeleteVm(by_name("web1"))).unwrap();
    let (at, order) = cell.last_order();
    cell.answer(at, &order, Happening::Removed);
    assert_eq!(cell.world.project(PROJECT).unwrap().used.vms, 0);
    assert_eq!(cell.world.held(at).vms, 0);
    cell.running("web2");
    let address = |cell: &Cell, vm: &str| {
        let id = cell.vm(vm).id;
        cell.world
            .ports()
            .find(|port| port.vm == Some(id))
            .unwrap()
            .ip
            .to_string()
    };
    assert_eq!(address(&cell, "web2"), "10.91.0.3");
    cell.tick(61);
    cell.running("web3");
    assert_eq!(address(&cell, "web3"), "10.91.0.2");
}

#[test]
fn addresses_that_rest_are_told_apart_from_those_in_use() {
    let mut cell = Cell::of(1);
    let addresses = |cell: &Cell| match cell
        .world
        .query(&admin(), &Query::Networks(Page { after: None, limit: 10 }), cell.now)
        .unwrap()
    {
        View::Networks(listing) => (listing.items[0].addresses_used, listing.items[0].addresses_resting),
        other => panic!("{other:?}"),
    };
    let before = addresses(&cell).0;
    cell.running("web1");
    cell.running("web2");
    cell.ask(Command::DeleteVm(by_name("web1"))).unwrap();
    let (at, order) = cell.last_order();
    cell.answer(at, &order, Happening::Removed);
    assert_eq!(addresses(&cell), (before + 2, 1));
    cell.tick(61);
    assert_eq!(addresses(&cell), (before + 1, 0));
}

#[test]
fn a_host_is_not_said_to_be_connected_because_it_was_before_a_restart() {
    let mut cell = Cell::of(1);
    let connected = |world: &engine::World, now| match world.query(&admin(), &Query::Host(by_name("h1")), now).unwrap()
    {
        View::Host(view) => (view.host.status.link, view.connected),
        other => panic!("{other:?}"),
    };
    assert_eq!(connected(&cell.world, cell.now), (Link::Up, true));
    let mut restarted = engine::World::load(cell.world.rows()).unwrap();
    assert_eq!(connected(&restarted, cell.now), (Link::Up, false));
    // After a failed commit the sessions are still there.
    restarted.set_connected([host(1)]);
    assert_eq!(connected(&restarted, cell.now), (Link::Up, true));
    cell.event(Event::Disconnected(host(1)));
    assert_eq!(connected(&cell.world, cell.now), (Link::Lost, false));
}

#[test]
fn a_vm_that_never_was_on_a_host_is_deleted_at_once() {
    let mut cell = Cell::of(1);
    let mut create = wanted("web1");
    create.start = false;
    assert_eq!(cell.operate(Command::CreateVm(create)).state.name(), "succeeded");
    assert_eq!(
        cell.operate(Command::DeleteVm(by_name("web1"))).state.name(),
        "succeeded"
    );
    assert_eq!(cell.world.vms().count(), 0);
}

#[test]
fn a_move_goes_through_its_stages_and_ends_with_a_receipt() {
    let mut cell = Cell::of(2);
    let (source, destination, receive, send) = moving(&mut cell);
    let Verb::Receive { terms, .. } = &receive.verb else {
        panic!()
    };
    assert_eq!((terms.held.0, terms.granted.0, terms.reclaimed.0), (1, 2, 3));
    assert_eq!((cell.world.held(source).vms, cell.world.held(destination).vms), (1, 1));
    for what in [
        Happening::Released,
        Happening::Copying,
        Happening::Stopped,
        Happening::Released,
    ] {
        cell.answer(source, &send, what);
    }
    cell.now.0 += 40;
    cell.answer(
        destination,
        &receive,
        Happening::Activated {
            resumed_at_ms: Some(1007),
        },
    );
    let vm = cell.vm("web1");
    assert_eq!(
        (vm.status.host, vm.status.generation, vm.status.state),
        (Some(destination), terms.granted, VmState::Active)
    );
    let port = cell.world.ports().find(|port| port.vm == Some(vm.id)).unwrap();
    assert_eq!((port.bound, port.generation), (Some(destination), terms.granted));
    cell.now.0 += 10;
    let receipt = Box::new(Receipt {
        bytes: Some(99),
        ..Receipt::default()
    });
    cell.answer(
        source,
        &send,
        Happening::TornDown {
            receipt,
            stopped_at_ms: Some(1000),
        },
    );
    let operation = cell.world.operation(terms.operation).unwrap();
    assert_eq!(operation.state.name(), "succeeded");
    let migration = operation.migration().unwrap();
    let stages: Vec<Stage> = migration.entered.iter().map(|(stage, _)| *stage).collect();
    assert!(stages.is_sorted() && stages.last() == Some(&Stage::Finished));
    let receipt = migration.receipt.as_ref().unwrap();
    assert_eq!(
        (
            receipt.request_to_running_ms,
            receipt.total_ms,
            receipt.stop_to_resume_ms,
            receipt.bytes
        ),
        (40, 50, Some(7), Some(99))
    );
    assert!(cell.vm("web1").status.moving.is_none());
    assert_eq!((cell.world.held(source).vms, cell.world.held(destination).vms), (0, 1));
}

#[test]
fn a_source_that_keeps_the_vm_rolls_the_move_back() {
    let mut cell = Cell::of(2);
    let (source, destination, receive, send) = moving(&mut cell);
    let reason = Refusal::new(Code::HostFailed, "the link broke");
    cell.answer(source, &send, Happening::Kept { reason });
    let vm = cell.vm("web1");
    assert_eq!(
        (vm.status.state, vm.status.host, vm.status.generation.0),
        (VmState::Active, Some(source), 1)
    );
    let (at, cancel) = cell.last_order();
    assert!(at == destination && matches!(cancel.verb, Verb::Cancel { .. }));
    assert_eq!(cell.world.operation(receive.operation).unwrap().state.name(), "failed");
    cell.answer(
        destination,
        &cancel,
        Happening::Voided {
            reason: "cancelled".to_owned(),
        },
    );
    assert!(cell.vm("web1").status.moving.is_none());
    assert_eq!(cell.world.held(destination).vms, 0);
}

#[test]
fn a_declined_move_ends_when_the_source_has_it_back() {
    let mut cell = Cell::of(2);
    let (source, destination, receive, send) = moving(&mut cell);
    cell.answer(source, &send, Happening::Released);
    cell.answer(
        destination,
        &receive,
        Happening::Voided {
            reason: "too late".to_owned(),
        },
    );
    assert!(
        cell.vm("web1").operation.is_some(),
        "once released only the source can tell that it has it back"
    );
    let report = VmReport {
        vm: send.vm,
        generation: model::Generation(3),
        revision: send.revision,
        operation: Some(send.operation),
        what: Happening::Reclaimed {
            reason: "declined".to_owned(),
        },
    };
    cell.report(source, Report::Vm(Box::new(report)));
    let vm = cell.vm("web1");
    assert_eq!(
        (vm.status.generation.0, vm.status.host, vm.operation),
        (3, Some(source), None)
    );
}

#[test]
fn cancel_is_accepted_before_the_release_and_too_late_after() {
    let mut cell = Cell::of(2);
    let (source, _, receive, send) = moving(&mut cell);
    cell.ask(Command::CancelOperation(receive.operation)).unwrap();
    let (at, cancel) = cell.last_order();
    assert!(at == source && matches!(cancel.verb, Verb::Cancel { .. }));
    cell.answer(source, &cancel, Happening::TooLate);
    let refusal = cell.ask(Command::CancelOperation(receive.operation)).unwrap_err();
    assert_eq!(refusal.code, Code::TooLate);
    assert_eq!(cell.world.operation(send.operation).unwrap().state.name(), "running");
}

#[test]
fn the_source_dying_ends_the_vm_and_nothing_restarts_it() {
    let mut cell = Cell::of(2);
    let (source, destination, receive, send) = moving(&mut cell);
    let cause = OffCause::Died {
        detail: "killed".to_owned(),
    };
    cell.answer(source, &send, Happening::Off { cause });
    assert_eq!(cell.vm("web1").status.state, VmState::Failed);
    let (at, cancel) = cell.last_order();
    assert!(at == destination && matches!(cancel.verb, Verb::Cancel { .. }));
    cell.answer(
        destination,
        &cancel,
        Happening::Voided {
            reason: "cancelled".to_owned(),
        },
    );
    assert_eq!(cell.world.operation(receive.operation).unwrap().state.name(), "failed");
    assert_eq!((cell.world.held(source).vms, cell.world.held(destination).vms), (0, 0));
}

#[test]
fn a_vm_of_which_nobody_knows_who_has_it_starts_only_when_both_hosts_are_clear() {
    let mut cell = Cell::of(2);
    let (source, _, _, send) = moving(&mut cell);
    cell.answer(
        source,
        &send,
        Happening::Unknown {
            reason: "its journal is gone".to_owned(),
        },
    );
    assert_eq!(cell.vm("web1").status.state, VmState::Failed);
    assert_eq!(
        cell.ask(Command::StartVm(by_name("web1"))).unwrap_err().code,
        Code::WrongState
    );
    cell.connect(1, boot(11));
    assert_eq!(
        cell.ask(Command::StartVm(by_name("web1"))).unwrap_err().code,
        Code::WrongState
    );
    cell.connect(2, boot(12));
    cell.ask(Command::StartVm(by_name("web1"))).unwrap();
    assert!(cell.vm("web1").status.generation.0 > 3, "above all that were reserved");
}

#[test]
fn a_source_that_is_lost_after_the_move_does_not_keep_the_operation() {
    let mut cell = Cell::of(2);
    let (source, destination, receive, _) = moving(&mut cell);
    cell.event(Event::Disconnected(source));
    cell.answer(destination, &receive, Happening::Activated { resumed_at_ms: None });
    cell.tick(700);
    assert_eq!(
        cell.world.operation(receive.operation).unwrap().state.name(),
        "succeeded"
    );
    assert!(
        cell.world
            .notices(model::id::Sequence(0))
            .any(|notice| notice.what == "vm.residue")
    );
    assert_eq!(cell.world.held(source).vms, 1, "its memory may still be taken there");
    cell.event(Event::Connected(source));
    cell.report(source, Report::Inventory { vms: Vec::new() });
    assert_eq!(cell.world.held(source).vms, 0);
}

#[test]
fn a_move_is_refused_with_every_reason_and_what_would_allow_it() {
    let mut cell = Cell::of(2);
    let source = cell.running("web1");
    let other = if source == host(1) { 2 } else { 1 };
    let mut lacking = facts(boot(other), &[]);
    lacking.hypervisor.machine_types.clear();
    lacking.hypervisor.migration.clear();
    cell.report(host(other), Report::Facts(Box::new(lacking)));
    cell.ask(Command::SetSchedulable {
        host: by_name(&format!("h{other}")),
        schedulable: false,
    })
    .unwrap();
    let mut request = cell.request(migrate("web1"));
    request.dry_run = true;
    let Outcome::Plan(plan) = cell.submit(request).unwrap() else {
        panic!()
    };
    assert_eq!(plan.host, None);
    let verdict = plan.hosts.iter().find(|verdict| verdict.host == host(other)).unwrap();
    for reason in ["schedulable", "machine type", "pool", "return-path"] {
        assert!(
            verdict.refused.iter().any(|text| text.contains(reason)),
            "{reason}: {verdict:?}"
        );
    }
    assert_eq!(cell.ask(migrate("web1")).unwrap_err().code, Code::NoCapacity);
}

#[test]
fn a_host_touches_only_its_own_vms() {
    let mut cell = Cell::of(3);
    let (source, destination, receive, send) = moving(&mut cell);
    let stranger = (1..=3)
        .map(host)
        .find(|host| ![source, destination].contains(host))
        .unwrap();
    let before = cell.vm("web1");
    for what in [
        Happening::Activated { resumed_at_ms: None },
        Happening::Off { cause: OffCause::Guest },
        Happening::Removed,
    ] {
        cell.answer(stranger, &receive, what.clone());
        cell.answer(stranger, &send, what);
    }
    assert_eq!(cell.vm("web1"), before);
    let relay = Relay {
        vm: send.vm,
        granted: model::Generation(2),
        from: source,
        to: destination,
        message: Message::Release,
    };
    let passed = |effects: Vec<Effect>| {
        effects
            .iter()
            .filter(|effect| matches!(effect, Effect::Send(_, order) if matches!(**order, Order::Relay(_))))
            .count()
    };
    assert_eq!(
        passed(cell.event(Event::Report(source, Box::new(Report::Relay(relay))))),
        1
    );
    assert_eq!(
        passed(cell.event(Event::Report(stranger, Box::new(Report::Relay(relay))))),
        0
    );
    let forged = Relay {
        from: stranger,
        ..relay
    };
    assert_eq!(
        passed(cell.event(Event::Report(stranger, Box::new(Report::Relay(forged))))),
        0
    );
}

#[test]
fn a_lost_host_is_an_alarm_and_its_reboot_ends_its_vms() {
    let mut cell = Cell::of(2);
    let at = cell.running("web1");
    cell.event(Event::Disconnected(at));
    assert_eq!(cell.vm("web1").status.state, VmState::Active);
    let start = cell.ask(Command::StartVm(by_name("web1"))).unwrap_err();
    assert_eq!(start.code, Code::HostUnreachable, "nobody knows whether it runs");
    assert!(
        cell.world
            .notices(model::id::Sequence(0))
            .any(|notice| notice.what == "host.lost")
    );
    let n = if at == host(1) { 1 } else { 2 };
    cell.connect(n, boot(9));
    let vm = cell.vm("web1");
    assert_eq!(vm.status.state, VmState::Inactive);
    assert!(vm.status.reason.unwrap().contains("rebooted"));
}

#[test]
fn an_inventory_is_followed_and_unknown_vms_are_only_told() {
    let mut cell = Cell::of(1);
    let at = cell.running("web1");
    let vm = cell.vm("web1");
    let seen = |vm, what| VmObserved {
        vm,
        generation: model::Generation(1),
        revision: model::Revision(1),
        what,
    };
    let stray = model::VmId(Uuid::from_u128(0xdead));
    cell.sent.clear();
    cell.report(
        at,
        Report::Inventory {
            vms: vec![seen(vm.id, Happening::Paused), seen(stray, Happening::Running)],
        },
    );
    assert_eq!(cell.vm("web1").status.state, VmState::Paused);
    assert!(cell.sent.is_empty(), "nothing is done to a VM that is not known");
    assert!(
        cell.world
            .notices(model::id::Sequence(0))
            .any(|notice| notice.what == "host.report-ignored")
    );
    cell.report(at, Report::Inventory { vms: Vec::new() });
    assert_eq!(cell.vm("web1").status.state, VmState::Failed);
}

#[test]
fn orders_wait_in_the_outbox_until_they_are_answered() {
    let mut cell = Cell::of(1);
    cell.ask(Command::CreateVm(wanted("web1"))).unwrap();
    let (at, order) = cell.last_order();
    assert_eq!(cell.world.outbox(at).count(), 1);
    cell.world.set_epoch(model::Epoch(5));
    let waiting = cell.world.outbox(at).next().unwrap();
    assert!(matches!(waiting, Order::Vm(order) if order.epoch == model::Epoch(5)));
    cell.answer(at, &order, Happening::Running);
    assert_eq!(cell.world.outbox(at).count(), 0);
}

#[test]
fn a_start_that_nobody_answers_ends_and_its_vm_is_ended() {
    let mut cell = Cell::of(1);
    let operation = cell.operate(Command::CreateVm(wanted("web1")));
    cell.tick(301);
    let operation = cell.world.operation(operation.id).unwrap();
    assert_eq!(operation.state.name(), "failed");
    let (at, kill) = cell.last_order();
    assert!(matches!(kill.verb, Verb::Kill));
    assert_eq!(cell.world.held(at).vms, 1, "until its host says that it is off");
    cell.answer(
        at,
        &kill,
        Happening::Off {
            cause: OffCause::Ordered,
        },
    );
    assert_eq!(
        (cell.vm("web1").status.state, cell.world.held(at).vms),
        (VmState::Inactive, 0)
    );
}

#[test]
fn a_join_token_serves_once_and_names_are_made_unique() {
    let mut cell = Cell::of(1);
    let join = |n: u128| Command::JoinHost {
        token: model::TokenId(Uuid::from_u128(0x9999)),
        host: host(n),
        name: name("h1"),
    };
    assert_eq!(cell.ask(join(2)).unwrap_err().code, Code::Unauthenticated);
    let token = model::access::JoinToken {
        id: model::TokenId(Uuid::from_u128(0x9999)),
        hash: model::access::TokenHash([0; 32]),
        expires_at: model::Timestamp(cell.now.0 + 1000),
        created_by: "admin".to_owned(),
    };
    cell.ask(Command::AddJoinToken(token)).unwrap();
    cell.ask(join(2)).unwrap();
    assert_eq!(cell.world.host(host(2)).unwrap().name.as_str(), "h1-2");
    assert_eq!(cell.ask(join(3)).unwrap_err().code, Code::Unauthenticated);
    assert_eq!(cell.world.host(host(2)).unwrap().status.link, Link::Lost);
}

#[test]
fn a_host_or_template_in_use_stays() {
    let mut cell = Cell::of(1);
    cell.running("web1");
    assert_eq!(
        cell.ask(Command::RemoveHost(by_name("h1"))).unwrap_err().code,
        Code::WrongState
    );
    assert_eq!(
        cell.ask(Command::DeleteTemplate(by_name("micro"))).unwrap_err().code,
        Code::WrongState
    );
}

#[test]
fn pages_end_where_the_next_begins() {
    let mut cell = Cell::of(2);
    for n in 0..5 {
        cell.running(&format!("vm{n}"));
    }
    let mut after = None;
    let mut seen: BTreeMap<String, VmSpec> = BTreeMap::new();
    for expected in [2, 2, 1] {
        let query = Query::Vms(Page { limit: 2, after });
        let View::Vms(page) = cell.world.query(&admin(), &query, cell.now).unwrap() else {
            panic!()
        };
        assert_eq!(page.items.len(), expected);
        after = page.next;
        seen.extend(page.items.into_iter().map(|vm| (vm.name.to_string(), vm.spec)));
    }
    assert!(after.is_none() && seen.len() == 5);
    let query = Query::Operations(Page { limit: 1, after: None });
    let View::Operations(page) = cell.world.query(&admin(), &query, cell.now).unwrap() else {
        panic!()
    };
    assert_eq!(page.items[0].operation.target.name.as_str(), "vm4", "the newest first");
}
