//! What ports let through: told to their hosts whenever it changes, until they answer; nothing is told that did not change.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test ends where its promise is broken"
)]

mod cell;

use cell::*;
use model::{
    Code, Command, HostId, Order, Report, Revision, VmId,
    command::{CreateVm, LimitChange, PortChange},
    name::Reference,
    order::{Happening, PortOrder, PortReport, Verb, VmReport},
    policy::{Direction, NewRule, Protocol, RateLimit, TCP},
};

fn rule(ports: Option<&str>, remote_group: Option<&str>) -> NewRule {
    NewRule {
        direction: Direction::Ingress,
        protocol: Protocol::Tcp,
        ports: ports.map(|ports| ports.parse().unwrap()),
        remote: None,
        remote_group: remote_group.map(by_name),
    }
}

fn group(cell: &mut Cell, group: &str) {
    cell.ask(Command::CreateSecurityGroup { name: name(group) }).unwrap();
}

fn add(cell: &mut Cell, group: &str, rule: NewRule) {
    let group = by_name(group);
    cell.ask(Command::AddSecurityRule { group, rule }).unwrap();
}

/// A VM in a group, running; what its host was told of its port at the start.
fn vm(cell: &mut Cell, vm: &str, groups: &[&str]) -> (VmId, HostId) {
    let wanted = CreateVm {
        security_groups: groups.iter().map(|group| by_name(group)).collect(),
        ..wanted(vm)
    };
    cell.ask(Command::CreateVm(wanted)).unwrap();
    let at = cell
        .sent
        .iter()
        .rposition(|(_, order)| matches!(order, Order::Vm(_)))
        .unwrap();
    let (host, Order::Vm(order)) = cell.sent.remove(at) else {
        panic!()
    };
    cell.report(
        host,
        Report::Vm(Box::new(VmReport {
            vm: order.vm,
            generation: order.generation,
            revision: order.revision,
            operation: Some(order.operation),
            what: Happening::Running,
        })),
    );
    (order.vm, host)
}

/// What hosts were told of ports since this was asked last.
fn told(cell: &mut Cell) -> Vec<(HostId, PortOrder)> {
    let sent = std::mem::take(&mut cell.sent).into_iter();
    let ports = sent.map(|(host, order)| match order {
        Order::Port(order) => (host, *order),
        other => panic!("{other:?}"),
    });
    ports.collect()
}

fn answer(cell: &mut Cell, host: HostId, order: &PortOrder) {
    let report = PortReport {
        port: order.port.port,
        revision: order.port.policy.revision,
        refused: None,
    };
    cell.report(host, Report::Port(report));
}

#[test]
fn a_change_of_a_group_is_told_to_the_hosts_of_its_ports_until_they_answer() {
    let mut cell = Cell::of(2);
    group(&mut cell, "web");
    let (first, host) = vm(&mut cell, "a", &["web"]);
    vm(&mut cell, "b", &[]);
    assert_eq!(told(&mut cell), []);
    add(&mut cell, "web", rule(Some("80"), None));
    let orders = told(&mut cell);
    let [(to, order)] = &orders[..] else {
        panic!("{orders:?}")
    };
    assert_eq!((*to, order.vm), (host, first));
    let filter = order.port.policy.filter.as_ref().unwrap();
    assert_eq!(
        (filter.ingress.len(), filter.egress.len()),
        (1, 1),
        "rule 1 lets everything out"
    );
    assert!(cell.world.outbox(host).any(|order| matches!(order, Order::Port(_))));
    add(&mut cell, "web", rule(Some("80"), None));
    assert_eq!(told(&mut cell), [], "it has that rule");
    add(&mut cell, "web", rule(Some("443"), None));
    let newer = told(&mut cell).remove(0).1;
    assert!(newer.port.policy.revision > order.port.policy.revision);
    answer(&mut cell, host, order);
    assert!(cell.world.outbox(host).count() == 1, "an older one was answered");
    answer(&mut cell, host, &newer);
    assert_eq!(cell.world.outbox(host).count(), 0);
    let port = cell.world.ports().find(|port| port.id == newer.port.port).unwrap();
    assert_eq!(port.applied, newer.port.policy.revision);
}

#[test]
fn who_comes_to_a_group_is_let_in_where_its_rules_speak_of_it_and_who_goes_is_not() {
    let mut cell = Cell::of(1);
    group(&mut cell, "web");
    group(&mut cell, "db");
    add(&mut cell, "db", rule(Some("5432"), Some("web")));
    vm(&mut cell, "db1", &["db"]);
    assert_eq!(told(&mut cell), []);
    let remote = |cell: &mut Cell| {
        let orders = told(cell);
        let [(_, order)] = &orders[..] else {
            panic!("{orders:?}")
        };
        let allowed = &order.port.policy.filter.as_ref().unwrap().ingress[0];
        allowed.remote.clone().unwrap()
    };
    vm(&mut cell, "web1", &["web"]);
    let web1 = cell
        .world
        .ports()
        .find(|port| !port.spec.groups.is_empty() && port.ip.octets()[3] == 3)
        .unwrap()
        .ip;
    assert_eq!(remote(&mut cell), [format!("{web1}").parse().unwrap()]);
    let change = |groups: &[&str]| Command::SetPort {
        port: by_name("web1"),
        change: Box::new(PortChange {
            security_groups: Some(groups.iter().map(|group| by_name(group)).collect()),
            ..PortChange::default()
        }),
    };
    cell.ask(change(&[])).unwrap();
    let orders = told(&mut cell);
    assert_eq!(orders.len(), 2, "itself, and the one that let it in");
    let of_db = orders
        .iter()
        .find(|(_, order)| order.port.policy.filter.is_some())
        .unwrap();
    assert_eq!(
        of_db.1.port.policy.filter.as_ref().unwrap().ingress[0].remote,
        Some(vec![]),
        "nobody"
    );
    cell.ask(change(&[])).unwrap();
    assert_eq!(told(&mut cell), [], "nothing changed");
}

#[test]
fn what_makes_no_sense_is_refused_and_changes_nothing() {
    let mut cell = Cell::of(1);
    group(&mut cell, "web");
    vm(&mut cell, "a", &["web"]);
    let set = |change: PortChange| Command::SetPort {
        port: by_name("a"),
        change: Box::new(change),
    };
    let limit = |bytes_per_s, burst_bytes| PortChange {
        to_guest: Some(LimitChange::Limit(RateLimit {
            bytes_per_s,
            burst_bytes,
        })),
        ..PortChange::default()
    };
    let web = || by_name("web");
    let add = |rule| Command::AddSecurityRule { group: web(), rule };
    let ported = NewRule {
        protocol: Protocol::Icmp,
        ..rule(Some("80"), None)
    };
    let both = NewRule {
        remote: Some("10.0.0.0/8".parse().unwrap()),
        ..rule(None, Some("web"))
    };
    let many = PortChange {
        allow_addresses: Some(vec!["10.0.0.0/8".parse().unwrap(); 17]),
        ..PortChange::default()
    };
    let before = cell.changes;
    for (command, code) in [
        (set(limit(15_999, None)), Code::InvalidInput),
        (set(limit(12_500_000_001, None)), Code::InvalidInput),
        (set(limit(1 << 20, Some((1 << 30) + 1))), Code::InvalidInput),
        (set(many), Code::InvalidInput),
        (add(ported), Code::InvalidInput),
        (add(both), Code::InvalidInput),
        (add(rule(None, Some("nobody"))), Code::NotFound),
        (Command::DeleteSecurityGroup(web()), Code::WrongState),
        (Command::CreateSecurityGroup { name: name("web") }, Code::NameTaken),
        (
            Command::RemoveSecurityRule {
                group: web(),
                number: 2,
            },
            Code::NotFound,
        ),
        (
            Command::SetPort {
                port: Reference::Id(uuid::Uuid::from_u128(7)),
                change: Box::default(),
            },
            Code::NotFound,
        ),
    ] {
        let what = format!("{command:?}");
        assert_eq!(cell.ask(command).unwrap_err().code, code, "{what}");
    }
    // Each is in the audit log, which the world does not hold.
    assert_eq!(cell.changes - before, 11);
    assert_eq!(told(&mut cell), []);
}

#[test]
fn a_vm_that_moves_is_judged_alike_on_both_hosts_and_one_that_is_gone_on_none() {
    let mut cell = Cell::of(2);
    group(&mut cell, "web");
    let (id, _) = vm(&mut cell, "a", &["web"]);
    let to = None;
    cell.ask(Command::MigrateVm { vm: by_name("a"), to }).unwrap();
    let (_, Order::Vm(order)) = cell.sent.pop().unwrap() else {
        panic!()
    };
    let Verb::Receive { definition, .. } = &order.verb else {
        panic!("{order:?}")
    };
    let policy = &definition.ports[0].policy;
    let answered = model::policy::Flow {
        remote: "10.0.0.1".parse().unwrap(),
        protocol: TCP,
        guest_port: 1000,
        remote_port: 80,
        ending: false,
        expires_s: 1,
    };
    assert!(
        policy.filter.as_ref().unwrap().allows(&answered),
        "it began that itself"
    );
    add(&mut cell, "web", rule(Some("80"), None));
    let orders = told(&mut cell);
    assert_eq!(orders.len(), 2, "both hosts of the move");
    assert!(
        orders
            .iter()
            .all(|(_, order)| order.vm == id && order.port.policy.revision > policy.revision)
    );
    assert!(orders[0].1.port.policy.revision > Revision(0));
}
