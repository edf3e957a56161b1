//! What guests of a network are told: by whom it is said, what is refused, and what reaches the host that runs them.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test ends where its promise is broken"
)]

mod cell;

use cell::{Cell, admin, by_name, wanted};
use model::{
    Actor, Code, Command, Role,
    addressing::{Addressing, AddressingMethod, V6Prefix},
    order::{PortUse, Verb},
};

fn told() -> Addressing {
    Addressing {
        method: AddressingMethod::Dhcp,
        v6: Some(V6Prefix {
            address: "fd00:91::".parse().unwrap(),
            gateway: None,
        }),
        dns: vec!["9.9.9.9".parse().unwrap()],
        ..Addressing::default()
    }
}

fn set(network: &str, addressing: Addressing) -> Command {
    Command::SetAddressing {
        network: by_name(network),
        addressing,
    }
}

fn port(cell: &mut Cell, vm: &str) -> PortUse {
    cell.operate(Command::CreateVm(wanted(vm)));
    match cell.last_order().1.verb {
        Verb::Start { definition, .. } => definition.ports[0].clone(),
        other => panic!("not started: {other:?}"),
    }
}

#[test]
fn a_port_has_the_address_that_its_guest_makes_of_the_prefix_and_its_host_is_told_all() {
    let mut cell = Cell::of(1);
    cell.ask(set("default", told())).unwrap();
    let port = port(&mut cell, "web1");
    assert_eq!(port.addressing, told());
    assert_eq!(port.v6, Some(told().v6.unwrap().address_of(port.mac)));
    let other = self::port(&mut cell, "web2");
    assert_ne!(other.v6, port.v6);
}

#[test]
fn a_prefix_stays_under_addresses_in_use_and_the_rest_may_change() {
    let mut cell = Cell::of(1);
    assert_eq!(port(&mut cell, "old").v6, None);
    let refused = cell.ask(set("default", told())).unwrap_err();
    assert_eq!(refused.code, Code::WrongState);
    assert!(refused.message.contains("1 addresses in use"), "{}", refused.message);
    let rest = Addressing { v6: None, ..told() };
    cell.ask(set("default", rest.clone())).unwrap();
    assert_eq!(port(&mut cell, "new").addressing, rest);
}

#[test]
fn what_guests_cannot_be_told_who_may_not_say_it_and_a_dry_run_change_nothing() {
    let mut cell = Cell::of(1);
    let bad = Addressing { lease_s: 1, ..told() };
    assert_eq!(cell.ask(set("default", bad)).unwrap_err().code, Code::InvalidInput);
    assert_eq!(cell.ask(set("none", told())).unwrap_err().code, Code::NotFound);
    let mut request = cell.request(set("default", told()));
    request.actor = Actor {
        role: Role::Operator,
        ..admin()
    };
    assert_eq!(cell.submit(request).unwrap_err().code, Code::Forbidden);
    let mut request = cell.request(set("default", told()));
    request.dry_run = true;
    cell.submit(request).unwrap();
    assert_eq!(port(&mut cell, "web1").addressing, Addressing::default());
}

#[test]
fn a_project_that_shares_the_network_may_not_change_it() {
    let mut cell = Cell::of(1);
    let (team, quota) = (cell::name("team-a"), model::access::Quota::default());
    cell.ask(Command::CreateProject {
        name: team.clone(),
        quota,
    })
    .unwrap();
    let project = cell.world.project_by_name(&team).unwrap().id;
    let mut request = cell.request(set("default", told()));
    request.actor.project = project;
    let refused = cell.submit(request).unwrap_err();
    assert_eq!(refused.code, Code::NotFound);
    assert!(refused.message.contains("project default"), "{}", refused.message);
}
