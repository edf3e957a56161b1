//! Users, what they may do, their sessions, and tokens for programs.

use std::collections::BTreeMap;

use model::{
    Actor, Code, Key, Millis, Name, Outcome, Refusal, Request, Role, Row, TokenId, User, UserId, Via,
    access::{ApiToken, PasswordHash, TokenHash, TokenKind},
    command::NewToken,
    name::Reference,
};

use crate::{
    request::{Decision, Fresh, refuse},
    txn::Txn,
    world::World,
};

/// Most users of a cell.
const USERS_MAX: usize = 10_000;
/// Most service tokens of a project.
const TOKENS_MAX: usize = 1000;
/// Most sessions of a user; the oldest ends for one more.
const SESSIONS_MAX: usize = 32;
/// Names that audit entries use for others than users.
const RESERVED: [&str; 1] = ["controller"];

/// The user that is meant.
pub(crate) fn find<'w>(world: &'w World, reference: &Reference) -> Result<&'w User, Box<Refusal>> {
    let id = match reference {
        Reference::Id(id) => Some(UserId(*id)),
        Reference::Name(name) => world.index.user_names.get(name).copied(),
    };
    id.and_then(|id| world.user(id)).ok_or_else(|| unknown(reference))
}

/// There is none, or none that the actor may know of.
pub(crate) fn unknown(reference: &Reference) -> Box<Refusal> {
    let message = format!("there is no user {reference}");
    refuse(
        Code::NotFound,
        message,
        "`godwit user list` shows those that you may see",
    )
}

/// Makes a user.
pub(crate) fn create(txn: &mut Txn<'_>, request: &Request, name: &Name, password: &PasswordHash) -> Decision {
    let world = txn.world();
    if world.index.user_names.contains_key(name) || RESERVED.contains(&name.as_str()) {
        let message = format!("the name {name} is taken");
        return Err(refuse(Code::NameTaken, message, "choose another name"));
    }
    if world.users.len() >= USERS_MAX {
        let message = format!("the cell has {USERS_MAX} users, which is as many as it takes");
        return Err(refuse(Code::NoCapacity, message, "delete users who have left"));
    }
    let mut fresh = Fresh::of(request);
    let id = loop {
        let id: UserId = fresh.next()?;
        if !world.users.contains_key(&id) {
            break id;
        }
    };
    if !request.dry_run {
        let created_at = txn.now;
        txn.put(Row::User(Box::new(User {
            id,
            name: name.clone(),
            password: password.clone(),
            cloud_admin: false,
            grants: BTreeMap::new(),
            disabled: false,
            created_at,
        })));
    }
    Ok(Outcome::Done)
}

/// Changes a password, and ends the sessions that were begun with the old one, but for the one that asks.
pub(crate) fn set_password(
    txn: &mut Txn<'_>,
    request: &Request,
    reference: &Reference,
    password: &PasswordHash,
) -> Decision {
    let actor = &request.actor;
    let own = find(txn.world(), reference).ok().map(|user| user.id);
    if actor.role < Role::CloudAdmin && (own.is_none() || own != actor.via.user) {
        // Whether there is such a user is not told either.
        let message = format!("{} may change its own password only", actor.subject);
        return Err(refuse(Code::Forbidden, message, "ask a cloud admin"));
    }
    let id = find(txn.world(), reference)?.id;
    if !request.dry_run {
        txn.edit_user(id, |user| user.password = password.clone());
        let kept = actor.via.token;
        end_tokens(txn, id, |token| {
            token.kind == TokenKind::Session && Some(token.id) != kept
        });
    }
    Ok(Outcome::Done)
}

/// Keeps a user out, or lets it in again.
pub(crate) fn set_disabled(txn: &mut Txn<'_>, request: &Request, reference: &Reference, disabled: bool) -> Decision {
    let user = find(txn.world(), reference)?;
    let (id, name) = (user.id, user.name.clone());
    if disabled {
        keeps_an_admin(txn.world(), Some(id), None, &format!("disabling {name}"))?;
    }
    if !request.dry_run {
        txn.edit_user(id, |user| user.disabled = disabled);
        if disabled {
            end_tokens(txn, id, |_| true);
        }
    }
    Ok(Outcome::Done)
}

/// Deletes a user.
pub(crate) fn delete(txn: &mut Txn<'_>, request: &Request, reference: &Reference) -> Decision {
    let user = find(txn.world(), reference)?;
    let (id, name) = (user.id, user.name.clone());
    keeps_an_admin(txn.world(), Some(id), None, &format!("deleting {name}"))?;
    if !request.dry_run {
        end_tokens(txn, id, |_| true);
        txn.delete(Key::User(id));
    }
    Ok(Outcome::Done)
}

/// Gives a user a role: in the actor's project, or that of a cloud admin.
pub(crate) fn grant(txn: &mut Txn<'_>, request: &Request, reference: &Reference, role: Role) -> Decision {
    // That the actor has that role itself was checked on admission: a grant needs what it gives.
    let id = find(txn.world(), reference)?.id;
    let project = request.actor.project;
    if !request.dry_run {
        txn.edit_user(id, |user| match role {
            Role::CloudAdmin => user.cloud_admin = true,
            role => drop(user.grants.insert(project, role)),
        });
    }
    Ok(Outcome::Done)
}

/// Takes a user's role away.
pub(crate) fn revoke(txn: &mut Txn<'_>, request: &Request, reference: &Reference, cloud_admin: bool) -> Decision {
    let user = find(txn.world(), reference)?;
    let (id, name) = (user.id, user.name.clone());
    if cloud_admin {
        keeps_an_admin(txn.world(), Some(id), None, &format!("taking that role from {name}"))?;
    }
    if request.dry_run {
        return Ok(Outcome::Done);
    }
    let project = request.actor.project;
    txn.edit_user(id, |user| {
        if cloud_admin {
            user.cloud_admin = false;
        } else {
            user.grants.remove(&project);
        }
    });
    let Some(left) = txn.world().user(id).cloned() else {
        return Ok(Outcome::Done);
    };
    // Tokens for a project in which their owner has no role would never be worth anything again.
    end_tokens(txn, id, |token| {
        token.kind == TokenKind::Service && left.role_in(token.actor.project).is_none()
    });
    Ok(Outcome::Done)
}

/// Makes a service token of the actor's project.
pub(crate) fn create_token(txn: &mut Txn<'_>, request: &Request, wanted: &NewToken) -> Decision {
    let (world, actor) = (txn.world(), &request.actor);
    let maker = actor.via.token.and_then(|id| world.api_tokens.get(&id));
    if world.api_tokens.contains_key(&wanted.id) {
        let message = "there is a token with this id";
        return Err(refuse(Code::InvalidInput, message, "make a new one"));
    }
    if world
        .index
        .token_names
        .contains_key(&(actor.project, wanted.name.clone()))
    {
        let message = format!("there is a token {} in this project already", wanted.name);
        return Err(refuse(
            Code::NameTaken,
            message,
            "choose another name, or revoke that one",
        ));
    }
    if world.index.service_tokens(actor.project).count() >= TOKENS_MAX {
        let message = format!("the project has {TOKENS_MAX} tokens, which is as many as it takes");
        return Err(refuse(Code::NoCapacity, message, "revoke tokens that nobody uses"));
    }
    if wanted.expires_at.is_some_and(|end| end <= txn.now) {
        let message = format!("token {} would never be valid", wanted.name);
        return Err(refuse(Code::InvalidInput, message, "give it an end that is to come"));
    }
    let bound = maker
        .filter(|maker| maker.kind == TokenKind::Service)
        .and_then(|maker| maker.expires_at);
    if bound.is_some_and(|bound| wanted.expires_at.is_none_or(|end| end > bound)) {
        let message = format!("token {} would outlive the token that asks for it", wanted.name);
        return Err(refuse(
            Code::Forbidden,
            message,
            "give it an earlier end, or log in and make it",
        ));
    }
    let owner = actor.via.user.and_then(|id| world.user(id));
    let by = owner.map_or_else(
        || actor.subject.split('/').next().unwrap_or_default().to_owned(),
        |owner| owner.name.to_string(),
    );
    let token = ApiToken {
        id: wanted.id,
        hash: wanted.hash,
        actor: Actor {
            subject: format!("{by}/{}", wanted.name),
            project: actor.project,
            role: wanted.role,
            via: Via::default(),
        },
        expires_at: wanted.expires_at,
        name: Some(wanted.name.clone()),
        kind: TokenKind::Service,
        owner: owner.map(|owner| owner.id),
        created_by: actor.subject.clone(),
        created_at: Some(txn.now),
    };
    if !request.dry_run {
        txn.put(Row::ApiToken(token));
    }
    Ok(Outcome::Done)
}

/// Ends a token.
pub(crate) fn revoke_token(txn: &mut Txn<'_>, request: &Request, id: TokenId) -> Decision {
    let (world, actor) = (txn.world(), &request.actor);
    let found = world.api_tokens.get(&id).filter(|token| may_see(actor, token));
    let Some(token) = found else {
        let message = format!("there is no token {id} that you may end");
        return Err(refuse(
            Code::NotFound,
            message,
            "`godwit token list` shows the project's",
        ));
    };
    let own = actor.via.token == Some(id) || (token.owner.is_some() && token.owner == actor.via.user);
    if !own && token.actor.role > actor.role {
        let message = format!("{} may not end a token that may do more than itself", actor.subject);
        return Err(refuse(Code::Forbidden, message, "ask a cloud admin"));
    }
    keeps_an_admin(world, None, Some(id), "ending this token")?;
    if !request.dry_run {
        txn.delete(Key::ApiToken(id));
    }
    Ok(Outcome::Done)
}

/// Whether an actor may know of a token: its own, those of the project that it administers, as a cloud admin all.
fn may_see(actor: &Actor, token: &ApiToken) -> bool {
    let own = actor.via.token == Some(token.id) || (token.owner.is_some() && token.owner == actor.via.user);
    let administers =
        actor.role >= Role::ProjectAdmin && token.kind == TokenKind::Service && token.actor.project == actor.project;
    own || administers || actor.role == Role::CloudAdmin
}

/// Begins a session. Whatever is wrong, the refusal is the same: who has no password learns nothing.
pub(crate) fn open_session(
    txn: &mut Txn<'_>,
    request: &Request,
    reference: &Reference,
    password: &PasswordHash,
    (id, hash, valid): (TokenId, TokenHash, Millis),
) -> Decision {
    let world = txn.world();
    let user = find(world, reference).ok();
    let user = user.filter(|user| user.password == *password && !user.disabled);
    let Some(user) = user.filter(|_| !world.api_tokens.contains_key(&id)) else {
        let message = "the user or the password is wrong";
        return Err(refuse(Code::Unauthenticated, message, "try again"));
    };
    let default: Name = "default".parse().expect("`default` is a name");
    let default = world.project_by_name(&default).map(|project| project.id);
    let home = default.filter(|project| user.role_in(*project).is_some());
    let Some(home) = home.or_else(|| user.grants.keys().next().copied()) else {
        let message = format!("user {} has no role in any project", user.name);
        return Err(refuse(
            Code::Forbidden,
            message,
            "ask a project admin for one: `godwit user grant`",
        ));
    };
    let token = ApiToken {
        id,
        hash,
        actor: Actor {
            subject: user.name.to_string(),
            project: home,
            // What the user may do bounds it.
            role: Role::CloudAdmin,
            via: Via::default(),
        },
        expires_at: Some(txn.now.after(valid)),
        name: None,
        kind: TokenKind::Session,
        owner: Some(user.id),
        created_by: user.name.to_string(),
        created_at: Some(txn.now),
    };
    let sessions = world
        .index
        .tokens_of(user.id)
        .filter_map(|id| world.api_tokens.get(&id));
    let mut sessions: Vec<_> = sessions
        .filter(|token| token.kind == TokenKind::Session)
        .map(|token| (token.created_at, token.id))
        .collect();
    sessions.sort_unstable();
    let surplus = (sessions.len() + 1).saturating_sub(SESSIONS_MAX);
    if !request.dry_run {
        sessions
            .into_iter()
            .take(surplus)
            .for_each(|(_, id)| txn.delete(Key::ApiToken(id)));
        txn.put(Row::ApiToken(token));
    }
    Ok(Outcome::Done)
}

/// Ends a user's tokens.
fn end_tokens(txn: &mut Txn<'_>, user: UserId, which: impl Fn(&ApiToken) -> bool) {
    let world = txn.world();
    let tokens = world.index.tokens_of(user).filter_map(|id| world.api_tokens.get(&id));
    let ended: Vec<TokenId> = tokens.filter(|token| which(token)).map(|token| token.id).collect();
    ended.into_iter().for_each(|id| txn.delete(Key::ApiToken(id)));
}

/// Refuses what would leave nobody who may do everything: an enabled cloud admin, or a token without owner and end.
fn keeps_an_admin(
    world: &World,
    without: Option<UserId>,
    without_token: Option<TokenId>,
    what: &str,
) -> Result<(), Box<Refusal>> {
    let index = &world.index;
    let concerns = without.is_some_and(|id| index.cloud_admins.contains(&id))
        || without_token.is_some_and(|id| index.root_tokens.contains(&id));
    let users = index.cloud_admins.iter().any(|id| Some(*id) != without);
    let tokens = index.root_tokens.iter().any(|id| Some(*id) != without_token);
    if !concerns || users || tokens {
        return Ok(());
    }
    let message = format!("{what} would leave nobody who may do everything");
    Err(refuse(
        Code::WrongState,
        message,
        "make another user cloud admin first: `godwit user grant USER cloud-admin`",
    ))
}
