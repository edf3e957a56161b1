//! Users, tokens, projects: who may do what, what ends with what, and what is written down.

#![allow(clippy::unwrap_used, clippy::panic)] // a test fails by panicking, its helpers too

mod cell;

use cell::*;
use model::{
    AuditEntry, Change, Code, Command, Effect, Event, Millis, ProjectId, Refusal, Request, Role, Row, TokenId, UserId,
    Via,
    access::{PasswordHash, Quota, TokenHash},
    audit::AuditResult,
    command::NewToken,
    query::{Page, Query, View},
};
use uuid::Uuid;

fn hash(text: &str) -> PasswordHash {
    PasswordHash(text.to_owned())
}

fn token_id(n: u128) -> TokenId {
    TokenId(Uuid::from_u128(0x70_000 + n))
}

fn page() -> Page {
    Page {
        limit: 1000,
        after: None,
    }
}

fn user(cell: &mut Cell, name: &str) -> UserId {
    let command = Command::CreateUser {
        name: cell::name(name),
        password: hash(name),
    };
    cell.ask(command).unwrap();
    let View::User(view) = cell
        .world
        .query(&admin(), &Query::User(by_name(name)), cell.now)
        .unwrap()
    else {
        panic!("a user was asked for");
    };
    view.id
}

fn project(cell: &mut Cell, name: &str, quota: Quota) -> ProjectId {
    let command = Command::CreateProject {
        name: cell::name(name),
        quota,
    };
    cell.ask(command).unwrap();
    cell.world.project_by_name(&cell::name(name)).unwrap().id
}

fn grant(cell: &mut Cell, user: &str, project: ProjectId, role: Role) {
    let mut request = cell.request(Command::Grant {
        user: by_name(user),
        role,
    });
    request.actor.project = project;
    cell.submit(request).unwrap();
}

fn login(cell: &mut Cell, user: &str, n: u128) -> Result<(), Refusal> {
    let command = Command::OpenSession {
        user: by_name(user),
        password: hash(user),
        id: token_id(n),
        hash: TokenHash([u8::try_from(n).unwrap(); 32]),
        valid: Millis::seconds(3600),
    };
    cell.ask(command).map(drop)
}

/// A request with a token, as the controller makes it: with the right that the token had when it came.
fn with(cell: &mut Cell, n: u128, project: ProjectId, command: Command) -> Option<Request> {
    let token = cell.world.authenticate(token_id(n))?.clone();
    let owner = token.owner.and_then(|id| cell.world.user(id)).cloned();
    let role = token.role_in(project, owner.as_ref(), cell.now)?;
    let mut request = cell.request(command);
    request.actor.subject = token.actor.subject;
    request.actor.project = project;
    request.actor.role = role;
    request.actor.via = Via {
        user: token.owner,
        token: Some(token.id),
        remote: Some("192.0.2.9".parse().unwrap()),
    };
    Some(request)
}

fn ask(cell: &mut Cell, n: u128, project: ProjectId, command: Command) -> Result<(), Code> {
    let request = with(cell, n, project, command).ok_or(Code::Unauthenticated)?;
    cell.submit(request).map(drop).map_err(|refusal| refusal.code)
}

fn token(n: u128, name: &str, role: Role) -> NewToken {
    NewToken {
        id: token_id(n),
        hash: TokenHash([u8::try_from(n).unwrap(); 32]),
        name: cell::name(name),
        role,
        expires_at: None,
    }
}

fn give(user: &str, role: Role) -> Command {
    Command::Grant {
        user: by_name(user),
        role,
    }
}

/// Alice administers `team-a`, Bob operates there, Carol has nothing; Alice's session is token 1, Bob's 2.
fn team() -> (Cell, ProjectId) {
    let mut cell = Cell::of(2);
    for name in ["alice", "bob", "carol"] {
        user(&mut cell, name);
    }
    let team = project(&mut cell, "team-a", Quota::default());
    grant(&mut cell, "alice", team, Role::ProjectAdmin);
    grant(&mut cell, "bob", team, Role::Operator);
    login(&mut cell, "alice", 1).unwrap();
    login(&mut cell, "bob", 2).unwrap();
    (cell, team)
}

#[test]
fn nobody_grants_or_makes_tokens_beyond_what_they_may_themselves() {
    let (mut cell, team) = team();
    assert_eq!(ask(&mut cell, 1, team, give("carol", Role::ProjectAdmin)), Ok(()));
    assert_eq!(
        ask(&mut cell, 1, team, give("alice", Role::CloudAdmin)),
        Err(Code::Forbidden)
    );
    assert_eq!(ask(&mut cell, 2, team, give("bob", Role::Viewer)), Err(Code::Forbidden));
    let root = Command::CreateToken(token(10, "root", Role::CloudAdmin));
    assert_eq!(ask(&mut cell, 1, team, root), Err(Code::Forbidden));
    let ci = Command::CreateToken(token(11, "ci", Role::ProjectAdmin));
    assert_eq!(ask(&mut cell, 2, team, ci.clone()), Err(Code::Forbidden));
    assert_eq!(ask(&mut cell, 1, team, ci), Ok(()));
    // In a project where she has no role she is nobody.
    assert_eq!(
        ask(&mut cell, 1, PROJECT, give("alice", Role::Viewer)),
        Err(Code::Unauthenticated)
    );
    // Its maker's fall is the token's.
    grant(&mut cell, "alice", team, Role::Viewer);
    let more = Command::CreateToken(token(12, "more", Role::Viewer));
    assert_eq!(ask(&mut cell, 11, team, more), Err(Code::Forbidden));
}

#[test]
fn a_right_that_was_taken_away_between_asking_and_deciding_counts_for_nothing() {
    let (mut cell, team) = team();
    let late = with(&mut cell, 1, team, give("carol", Role::Viewer)).unwrap();
    let later = late.clone();
    grant(&mut cell, "alice", team, Role::Operator);
    assert_eq!(cell.submit(late).unwrap_err().code, Code::Forbidden);
    cell.ask(Command::SetUserDisabled {
        user: by_name("alice"),
        disabled: true,
    })
    .unwrap();
    assert_eq!(cell.submit(later).unwrap_err().code, Code::Unauthenticated);
}

#[test]
fn a_disabled_or_deleted_user_and_its_tokens_end_at_once() {
    let (mut cell, team) = team();
    ask(&mut cell, 1, team, Command::CreateToken(token(11, "ci", Role::Viewer))).unwrap();
    cell.ask(Command::SetUserDisabled {
        user: by_name("alice"),
        disabled: true,
    })
    .unwrap();
    assert!(cell.world.authenticate(token_id(1)).is_none() && cell.world.authenticate(token_id(11)).is_none());
    assert_eq!(login(&mut cell, "alice", 3).unwrap_err().code, Code::Unauthenticated);
    cell.ask(Command::SetUserDisabled {
        user: by_name("alice"),
        disabled: false,
    })
    .unwrap();
    assert!(
        cell.world.authenticate(token_id(11)).is_none(),
        "what ended stays ended"
    );
    login(&mut cell, "alice", 3).unwrap();
    cell.ask(Command::DeleteUser(by_name("alice"))).unwrap();
    assert!(cell.world.authenticate(token_id(3)).is_none());
    assert_eq!(login(&mut cell, "alice", 4).unwrap_err().code, Code::Unauthenticated);
}

#[test]
fn the_last_cloud_admin_cannot_be_removed_in_any_way() {
    let mut cell = Cell::empty();
    user(&mut cell, "root");
    cell.ask(give("root", Role::CloudAdmin)).unwrap();
    let root: Vec<TokenId> = cell
        .world
        .rows()
        .into_iter()
        .filter_map(|row| match row {
            Row::ApiToken(token) if token.owner.is_none() => Some(token.id),
            _ => None,
        })
        .collect();
    for id in root {
        cell.ask(Command::RevokeToken(id)).unwrap();
    }
    let attempts = [
        Command::DeleteUser(by_name("root")),
        Command::SetUserDisabled {
            user: by_name("root"),
            disabled: true,
        },
        Command::Revoke {
            user: by_name("root"),
            cloud_admin: true,
        },
    ];
    for command in attempts.clone() {
        assert_eq!(cell.ask(command).unwrap_err().code, Code::WrongState);
    }
    user(&mut cell, "second");
    cell.ask(give("second", Role::CloudAdmin)).unwrap();
    cell.ask(Command::SetUserDisabled {
        user: by_name("second"),
        disabled: true,
    })
    .unwrap();
    for command in attempts {
        assert_eq!(
            cell.ask(command).unwrap_err().code,
            Code::WrongState,
            "one that is disabled does not count"
        );
    }
    cell.ask(Command::SetUserDisabled {
        user: by_name("second"),
        disabled: false,
    })
    .unwrap();
    cell.ask(Command::DeleteUser(by_name("root"))).unwrap();
}

#[test]
fn a_password_is_changed_by_its_owner_or_a_cloud_admin_and_ends_other_sessions() {
    let (mut cell, team) = team();
    login(&mut cell, "alice", 3).unwrap();
    let change = |whose: &str| Command::SetPassword {
        user: by_name(whose),
        password: hash("new"),
    };
    assert_eq!(ask(&mut cell, 1, team, change("bob")), Err(Code::Forbidden));
    assert_eq!(
        ask(&mut cell, 1, team, change("nobody")),
        Err(Code::Forbidden),
        "who there is, is not told"
    );
    assert_eq!(ask(&mut cell, 1, team, change("alice")), Ok(()));
    assert!(cell.world.authenticate(token_id(1)).is_some() && cell.world.authenticate(token_id(3)).is_none());
    assert_eq!(
        login(&mut cell, "alice", 4).unwrap_err().code,
        Code::Unauthenticated,
        "checked against the old one"
    );
    cell.ask(change("bob")).unwrap();
    assert!(cell.world.authenticate(token_id(2)).is_none());
}

#[test]
fn a_token_ends_by_its_owner_or_who_administers_its_project_and_does_not_outlive_its_maker() {
    let (mut cell, team) = team();
    let other = project(&mut cell, "team-b", Quota::default());
    grant(&mut cell, "carol", other, Role::ProjectAdmin);
    login(&mut cell, "carol", 5).unwrap();
    let mut short = token(11, "ci", Role::ProjectAdmin);
    short.expires_at = Some(cell.now.after(Millis::seconds(60)));
    ask(&mut cell, 1, team, Command::CreateToken(short)).unwrap();
    let heir = Command::CreateToken(token(12, "heir", Role::Viewer));
    assert_eq!(ask(&mut cell, 11, team, heir), Err(Code::Forbidden));
    let again = Command::CreateToken(token(13, "ci", Role::Viewer));
    assert_eq!(ask(&mut cell, 1, team, again), Err(Code::NameTaken));
    assert_eq!(
        ask(&mut cell, 5, other, Command::RevokeToken(token_id(11))),
        Err(Code::NotFound)
    );
    assert_eq!(
        ask(&mut cell, 2, team, Command::RevokeToken(token_id(11))),
        Err(Code::NotFound)
    );
    assert_eq!(ask(&mut cell, 1, team, Command::RevokeToken(token_id(11))), Ok(()));
    assert_eq!(
        ask(&mut cell, 2, team, Command::RevokeToken(token_id(2))),
        Ok(()),
        "logging out is anybody's right"
    );
}

#[test]
fn a_project_is_deleted_when_it_is_empty_with_its_tokens_and_grants_and_default_never() {
    let (mut cell, team) = team();
    ask(&mut cell, 1, team, Command::CreateToken(token(11, "ci", Role::Viewer))).unwrap();
    let delete = |name: &str| Command::DeleteProject(by_name(name));
    assert_eq!(cell.ask(delete("default")).unwrap_err().code, Code::WrongState);
    assert_eq!(ask(&mut cell, 1, team, delete("team-a")), Err(Code::Forbidden));
    cell.ask(delete("team-a")).unwrap();
    assert!(cell.world.project(team).is_none() && cell.world.authenticate(token_id(11)).is_none());
    assert_eq!(
        ask(&mut cell, 1, team, give("bob", Role::Viewer)),
        Err(Code::Unauthenticated)
    );
    assert_eq!(
        login(&mut cell, "alice", 3).unwrap_err().code,
        Code::Forbidden,
        "she has no role left"
    );
    cell.running("web1");
    cell.ask(delete("default")).unwrap_err();
}

#[test]
fn people_see_of_others_what_their_role_allows() {
    let (mut cell, team) = team();
    let see = |cell: &mut Cell, n: u128, query: Query| {
        let actor = with(cell, n, team, Command::RevokeToken(token_id(n))).unwrap().actor;
        cell.world
            .query(&actor, &query, cell.now)
            .map_err(|refusal| refusal.code)
    };
    let View::Users(users) = see(&mut cell, 1, Query::Users(page())).unwrap() else {
        panic!()
    };
    let names: Vec<_> = users.items.iter().map(|user| user.name.to_string()).collect();
    assert_eq!(names, ["alice", "bob"]);
    assert!(matches!(see(&mut cell, 2, Query::Users(page())), Err(Code::Forbidden)));
    assert!(matches!(see(&mut cell, 2, Query::Tokens(page())), Err(Code::Forbidden)));
    assert!(matches!(
        see(&mut cell, 2, Query::User(by_name("alice"))),
        Err(Code::NotFound)
    ));
    assert!(matches!(
        see(&mut cell, 2, Query::User(by_name("bob"))),
        Ok(View::User(_))
    ));
    let View::Projects(projects) = see(&mut cell, 2, Query::Projects(page())).unwrap() else {
        panic!()
    };
    assert_eq!(projects.items.len(), 1);
    assert!(matches!(
        see(&mut cell, 2, Query::Project(by_name("default"))),
        Err(Code::NotFound)
    ));
    let View::Networks(networks) = see(&mut cell, 2, Query::Networks(page())).unwrap() else {
        panic!()
    };
    assert_eq!(networks.items.len(), 1, "the cell's network serves a project without");
}

#[test]
fn every_decision_is_written_down_with_who_what_whence_and_result_and_no_secret() {
    let (mut cell, team) = team();
    let entry = |cell: &mut Cell, request: Request| -> Vec<AuditEntry> {
        let effects = cell.event(Event::Request(Box::new(request)));
        effects
            .into_iter()
            .filter_map(|effect| match effect {
                Effect::Change(change) => match *change {
                    Change::Put(Row::Audit(entry)) => Some(*entry),
                    _ => None,
                },
                _ => None,
            })
            .collect()
    };
    let request = with(&mut cell, 2, team, give("carol", Role::Viewer)).unwrap();
    let found = entry(&mut cell, request.clone());
    assert_eq!(found.len(), 1);
    let first = &found[0];
    assert_eq!(
        (first.subject.as_str(), first.action.as_str(), first.target.as_str()),
        ("bob", "user.grant", "carol viewer")
    );
    assert_eq!(first.result, AuditResult::Refused { code: Code::Forbidden });
    assert_eq!(
        (first.token, first.project, first.remote),
        (Some(token_id(2)), Some(team), request.actor.via.remote)
    );
    let mut dry = with(&mut cell, 1, team, give("carol", Role::Viewer)).unwrap();
    dry.dry_run = true;
    assert!(entry(&mut cell, dry).is_empty());
    let secret = Command::SetPassword {
        user: by_name("bob"),
        password: hash("$argon2id$secret"),
    };
    let secret = cell.request(secret);
    let found = entry(&mut cell, secret);
    assert_eq!(found[0].result, AuditResult::Accepted { operation: None });
    assert!(!format!("{found:?}").contains("argon2id"));
    assert!(
        !format!("{:?}", cell.world).contains("argon2id"),
        "a world's debug output has no hash either"
    );
}

#[test]
fn a_quota_counts_what_is_made_and_given_back_in_every_dimension() {
    let mut cell = Cell::of(2);
    let set = |quota: Quota| Command::SetQuota {
        project: by_name("default"),
        quota,
    };
    cell.running("web1");
    let used = cell.world.project(PROJECT).unwrap().used;
    assert!(used.vms == 1 && used.vcpus > 0 && used.memory_mib > 0);
    for (bound, word) in [
        (
            Quota {
                vms: Some(used.vms),
                ..Quota::default()
            },
            "VMs",
        ),
        (
            Quota {
                vcpus: Some(used.vcpus),
                ..Quota::default()
            },
            "vCPUs",
        ),
        (
            Quota {
                memory_mib: Some(used.memory_mib),
                ..Quota::default()
            },
            "MiB",
        ),
        (
            Quota {
                disk_bytes: Some(used.disk_bytes),
                ..Quota::default()
            },
            "bytes of disk",
        ),
    ] {
        cell.ask(set(bound)).unwrap();
        let mut more = wanted("web2");
        more.disk_bytes = Some(1 << 30);
        let refusal = cell.ask(Command::CreateVm(more)).unwrap_err();
        assert_eq!(refusal.code, Code::QuotaExceeded);
        assert!(
            refusal.message.contains(word) && refusal.message.contains("asked"),
            "{refusal}"
        );
    }
    // A bound below what is held refuses what is new, and takes nothing away.
    cell.ask(set(Quota {
        vms: Some(0),
        ..Quota::default()
    }))
    .unwrap();
    assert_eq!(cell.world.project(PROJECT).unwrap().used, used);
}
