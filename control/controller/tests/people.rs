//! Logging in, sessions and what they open, seen through the controller's handle.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "the helpers of tests may panic as tests do"
)]

mod support;

use std::{net::IpAddr, time::Duration};

use controller::{Session, SubmitOptions};
use futures_util::StreamExt as _;
use model::{
    Actor, Code, Command, Refusal, Role, Secret,
    audit::{AuditFilter, AuditResult},
    name::Reference,
    query::Page,
};
use support::Cell;

const PASSWORD: &str = "correct horse";

fn secret(text: &str) -> Secret<String> {
    Secret::new(text.to_owned())
}

fn reference(name: &str) -> Reference {
    name.parse().unwrap()
}

fn from(n: u8) -> Option<IpAddr> {
    Some(IpAddr::from([192, 0, 2, n]))
}

async fn with_alice(role: Role) -> Cell {
    let cell = Cell::start().await;
    let options = SubmitOptions::default;
    cell.handle
        .create_user(cell.admin(), "alice".parse().unwrap(), secret(PASSWORD), options())
        .await
        .unwrap();
    let grant = Command::Grant {
        user: reference("alice"),
        role,
    };
    cell.handle.submit(cell.admin(), grant, options()).await.unwrap();
    cell
}

async fn login(cell: &Cell, user: &str, password: &str, n: u8) -> Result<Session, Refusal> {
    cell.handle
        .login(&user.parse().unwrap(), secret(password), from(n))
        .await
}

fn actor(cell: &Cell, session: &Session) -> Result<Actor, Refusal> {
    cell.handle.authenticate(session.token.expose())
}

#[tokio::test]
async fn a_session_speaks_for_its_user_as_long_as_the_user_may() {
    let cell = with_alice(Role::Operator).await;
    let session = login(&cell, "alice", PASSWORD, 1).await.unwrap();
    let alice = actor(&cell, &session).unwrap();
    assert_eq!((alice.subject.as_str(), alice.role), ("alice", Role::Operator));
    let refusal = cell
        .handle
        .authenticate_in(session.token.expose(), Some(&reference("nowhere")), None)
        .unwrap_err();
    assert_eq!(refusal.code, Code::NotFound);
    let mut told = cell.handle.watch(alice.clone(), None);
    let ended = tokio::spawn({
        let (handle, alice) = (cell.handle.clone(), alice.clone());
        async move { handle.right_ended(&alice).await }
    });
    let disable = Command::SetUserDisabled {
        user: reference("alice"),
        disabled: true,
    };
    cell.handle
        .submit(cell.admin(), disable, SubmitOptions::default())
        .await
        .unwrap();
    assert_eq!(actor(&cell, &session).unwrap_err().code, Code::Unauthenticated);
    tokio::time::timeout(Duration::from_secs(10), ended)
        .await
        .unwrap()
        .unwrap();
    // Something happens, which she is not told any more.
    cell.join("h1").await;
    let told = tokio::time::timeout(Duration::from_secs(10), told.next())
        .await
        .unwrap();
    assert!(told.is_none(), "{told:?}");
    assert_eq!(
        login(&cell, "alice", PASSWORD, 1).await.unwrap_err().code,
        Code::Unauthenticated
    );
}

#[tokio::test]
async fn a_wrong_password_and_an_unknown_user_are_told_alike_and_written_down() {
    let cell = with_alice(Role::Operator).await;
    let wrong = login(&cell, "alice", "wrong horse!", 1).await.unwrap_err();
    let unknown = login(&cell, "mallory", PASSWORD, 2).await.unwrap_err();
    assert_eq!(wrong, unknown);
    assert_eq!(wrong.code, Code::Unauthenticated);
    login(&cell, "alice", PASSWORD, 3).await.unwrap();
    let page = Page { limit: 3, after: None };
    let log = cell
        .handle
        .audit(&cell.admin(), AuditFilter::default(), page)
        .await
        .unwrap();
    let seen: Vec<_> = log
        .items
        .iter()
        .map(|entry| {
            let refused = matches!(entry.result, AuditResult::Refused { .. });
            (entry.subject.as_str(), entry.action.as_str(), refused, entry.remote)
        })
        .collect();
    let login = "session.login";
    assert_eq!(
        seen,
        [
            ("alice", login, false, from(3)),
            ("mallory", login, true, from(2)),
            ("alice", login, true, from(1))
        ]
    );
    assert!(
        log.items.iter().all(|entry| entry.project.is_none()),
        "seen by cloud admins alone"
    );
    let text = serde_json::to_string(&log).unwrap();
    assert!(!text.contains("horse") && !text.contains("argon2"), "{text}");
    let metrics = cell.handle.metrics(&cell.admin());
    assert!(
        metrics.contains("godwit_logins_total{result=\"refused\"} 2"),
        "{metrics}"
    );
    assert!(
        metrics.contains("godwit_logins_total{result=\"accepted\"} 1"),
        "{metrics}"
    );
}

#[tokio::test]
async fn guessing_is_slowed_down_and_keeps_nobody_else_out() {
    let cell = with_alice(Role::Viewer).await;
    let mut codes = Vec::new();
    for _ in 0..7 {
        codes.push(login(&cell, "alice", "wrong horse!", 1).await.unwrap_err().code);
    }
    assert_eq!(codes[..5], [Code::Unauthenticated; 5]);
    assert_eq!(codes[5..], [Code::TooManyAttempts; 2]);
    assert_eq!(
        login(&cell, "alice", PASSWORD, 1).await.unwrap_err().code,
        Code::TooManyAttempts
    );
    login(&cell, "alice", PASSWORD, 2).await.unwrap();
}

#[tokio::test]
async fn ones_own_password_is_changed_with_the_present_one_and_needs_a_new_one_of_some_length() {
    let cell = with_alice(Role::Viewer).await;
    let (here, there) = (
        login(&cell, "alice", PASSWORD, 1).await.unwrap(),
        login(&cell, "alice", PASSWORD, 2).await.unwrap(),
    );
    let change = async |old: Option<&str>, new: &str| {
        let alice = actor(&cell, &here).unwrap();
        let (old, new) = (old.map(secret), secret(new));
        cell.handle
            .set_password(alice, reference("alice"), old, new, SubmitOptions::default())
            .await
            .map_err(|refusal| refusal.code)
    };
    assert_eq!(change(None, "battery staple").await, Err(Code::Forbidden));
    assert_eq!(
        change(Some("wrong horse!"), "battery staple").await,
        Err(Code::Forbidden)
    );
    assert_eq!(change(Some(PASSWORD), "short").await, Err(Code::InvalidInput));
    assert_eq!(change(Some(PASSWORD), "battery staple").await, Ok(()));
    assert!(actor(&cell, &here).is_ok() && actor(&cell, &there).is_err());
    assert!(login(&cell, "alice", PASSWORD, 3).await.is_err());
    login(&cell, "alice", "battery staple", 3).await.unwrap();
}

#[tokio::test]
async fn what_people_were_given_survives_a_crash() {
    let mut cell = with_alice(Role::ProjectAdmin).await;
    let session = login(&cell, "alice", PASSWORD, 1).await.unwrap();
    let alice = actor(&cell, &session).unwrap();
    let (_, token) = cell
        .handle
        .create_token(
            alice,
            "ci".parse().unwrap(),
            Role::Viewer,
            None,
            SubmitOptions::default(),
        )
        .await
        .unwrap();
    cell.crash().await;
    assert_eq!(actor(&cell, &session).unwrap().role, Role::ProjectAdmin);
    let ci = cell.handle.authenticate(token.expose()).unwrap();
    assert_eq!((ci.subject.as_str(), ci.role), ("alice/ci", Role::Viewer));
}
