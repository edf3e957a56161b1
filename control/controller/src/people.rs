//! People and programs at the door: what a token is worth, logging in, passwords, tokens, and the audit log.

use std::net::IpAddr;

use identity::{ApiToken, ApiTokenDigest};
use model::{
    Actor, AuditEntry, Code, Command, Millis, Name, Refusal, Role, Secret, Timestamp, TokenId, Via,
    access::{PasswordHash, TokenKind},
    audit::{AuditFilter, AuditNote},
    command::NewToken,
    name::Reference,
    query::{Listing, Page},
};

use crate::{
    core::read_only,
    handle::{Handle, SubmitOptions, needs, token_hash, token_id},
    metrics::Login,
};

/// How long a session lasts.
const SESSION_VALID: Millis = Millis::seconds(12 * 3600);

/// A session that has begun.
#[derive(Debug)]
pub struct Session {
    /// The token's text. It is shown this once.
    pub token: Secret<String>,
    /// When it ends by itself.
    pub expires_at: Timestamp,
}

impl Handle {
    /// Whom a token speaks for, where it speaks for itself.
    ///
    /// # Errors
    /// As [`Handle::authenticate_in`].
    pub fn authenticate(&self, token: &str) -> Result<Actor, Refusal> {
        self.authenticate_in(token, None, None)
    }

    /// Whom a token speaks for: in the project that the request names, else in the token's own.
    ///
    /// # Errors
    /// `Unauthenticated`, whatever is wrong with the token; `NotFound` for a project in which it has no role, whether or not there is
    /// one; `Forbidden` for a session whose user has no role anywhere any more.
    pub fn authenticate_in(
        &self,
        token: &str,
        project: Option<&Reference>,
        remote: Option<IpAddr>,
    ) -> Result<Actor, Refusal> {
        let refused = || {
            Refusal::new(Code::Unauthenticated, "the token is not valid")
                .hint("log in with `godwit login`, or use the token that the administrator gave you")
        };
        let token: ApiToken = token.parse().map_err(|_| refused())?;
        let committed = &self.0.committed;
        let known = committed.token(token_id(&token)).ok_or_else(refused)?;
        let now = self.now();
        let valid = known.expires_at.is_none_or(|end| now < end);
        if !ApiTokenDigest(known.hash.0).matches(&token) || !valid {
            return Err(refused());
        }
        let chosen = match project {
            Some(reference) => {
                let unknown = || {
                    let message = format!("there is no project {reference} in which you have a role");
                    Refusal::new(Code::NotFound, message).hint("`godwit project list` shows those that you have")
                };
                let id = committed.project(reference).ok_or_else(unknown)?;
                let role = committed.role(&known, id, now).ok_or_else(unknown)?;
                Some((id, role))
            }
            None => {
                let home = match known.kind {
                    TokenKind::Service => Some(known.actor.project),
                    TokenKind::Session => committed.home(&known, now),
                };
                home.and_then(|id| Some((id, committed.role(&known, id, now)?)))
            }
        };
        let Some((project, role)) = chosen else {
            let message = format!("{} has no role in any project", known.actor.subject);
            return Err(Refusal::new(Code::Forbidden, message).hint("ask a project admin for one"));
        };
        let via = Via {
            user: known.owner,
            token: Some(known.id),
            remote,
        };
        Ok(Actor {
            subject: known.actor.subject,
            project,
            role,
            via,
        })
    }

    /// Begins a session for who knows the password.
    ///
    /// # Errors
    /// `Unauthenticated`, equally long after the call whether the user or the password is wrong; `TooManyAttempts`; `Forbidden` for
    /// a user without a role; `Overloaded`.
    pub async fn login(
        &self,
        user: &Name,
        password: Secret<String>,
        remote: Option<IpAddr>,
    ) -> Result<Session, Refusal> {
        let count = |result| {
            self.0.metrics.logins.get_or_create(&Login { result }).inc();
        };
        self.0
            .passwords
            .attempt(user, remote)
            .inspect_err(|_| count("too-many"))?;
        let known = self.0.committed.user(user).filter(|known| !known.disabled);
        let stored = known.map(|known| known.password);
        let right = self.0.passwords.is_right(password, stored.clone()).await?;
        let mut actor = self.own_actor().await?;
        actor.subject = user.to_string();
        actor.via.remote = remote;
        let (true, Some(password)) = (right, stored) else {
            count("refused");
            let refusal = Refusal::new(Code::Unauthenticated, "the user or the password is wrong").hint("try again");
            self.write_note(&actor, "session.login", user.to_string(), Some(&refusal), false)
                .await;
            return Err(refusal);
        };
        let token = new_token()?;
        let expires_at = self.now().after(SESSION_VALID);
        let command = Command::OpenSession {
            user: Reference::Name(user.clone()),
            password,
            id: token_id(&token),
            hash: token_hash(&token),
            valid: SESSION_VALID,
        };
        self.submit(actor, command, SubmitOptions::default())
            .await
            .inspect_err(|_| count("refused"))?;
        count("accepted");
        self.0.passwords.succeeded(user, remote);
        Ok(Session {
            token: Secret::new(token.reveal()),
            expires_at,
        })
    }

    /// Makes a user.
    ///
    /// # Errors
    /// When the actor may not, the name is taken, or the password is too short or too long.
    pub async fn create_user(
        &self,
        actor: Actor,
        name: Name,
        password: Secret<String>,
        options: SubmitOptions,
    ) -> Result<(), Refusal> {
        let password = self.hashed_for(&actor, Role::CloudAdmin, password).await?;
        let command = Command::CreateUser { name, password };
        self.submit(actor, command, options).await.map(drop)
    }

    /// Changes a password. Who changes its own must know the old one; a cloud admin need not.
    ///
    /// # Errors
    /// When the actor may not, the old password is wrong, or the new one too short or too long.
    pub async fn set_password(
        &self,
        actor: Actor,
        user: Reference,
        old: Option<Secret<String>>,
        new: Secret<String>,
        options: SubmitOptions,
    ) -> Result<(), Refusal> {
        if actor.role < Role::CloudAdmin {
            self.knows_own(&actor, old).await?;
        }
        let password = self.hashed_for(&actor, Role::Viewer, new).await?;
        let command = Command::SetPassword { user, password };
        self.submit(actor, command, options).await.map(drop)
    }

    /// Whether an actor knows the password of the user whose right it uses.
    async fn knows_own(&self, actor: &Actor, old: Option<Secret<String>>) -> Result<(), Refusal> {
        let own = actor.via.user.and_then(|id| self.0.committed.user_by_id(id));
        let (Some(own), Some(old)) = (own, old) else {
            let message = "the present password is needed to change it";
            return Err(Refusal::new(Code::Forbidden, message).hint("give it, or ask a cloud admin"));
        };
        self.0.passwords.attempt(&own.name, actor.via.remote)?;
        if self.0.passwords.is_right(old, Some(own.password)).await? {
            self.0.passwords.succeeded(&own.name, actor.via.remote);
            return Ok(());
        }
        let refusal = Refusal::new(Code::Forbidden, "the present password is another one").hint("try again");
        self.note(actor, "user.set-password", own.name.to_string(), Some(&refusal))
            .await;
        Err(refusal)
    }

    /// The hash, where the actor may make use of it; else none is worth its cost, and the engine refuses.
    async fn hashed_for(&self, actor: &Actor, role: Role, password: Secret<String>) -> Result<PasswordHash, Refusal> {
        if actor.role < role {
            return Ok(PasswordHash(String::new()));
        }
        self.0.passwords.hash(password).await
    }

    /// Makes a service token of the actor's project: its id and its text, which is shown this once.
    ///
    /// # Errors
    /// When the actor may not, or the name is taken.
    pub async fn create_token(
        &self,
        actor: Actor,
        name: Name,
        role: Role,
        valid: Option<Millis>,
        options: SubmitOptions,
    ) -> Result<(TokenId, Secret<String>), Refusal> {
        let token = new_token()?;
        let id = token_id(&token);
        let wanted = NewToken {
            id,
            hash: token_hash(&token),
            name,
            role,
            expires_at: valid.map(|valid| self.now().after(valid)),
        };
        self.submit(actor, Command::CreateToken(wanted), options).await?;
        Ok((id, Secret::new(token.reveal())))
    }

    /// A page of the audit log, the newest first: all of it for a cloud admin, else of the project.
    ///
    /// # Errors
    /// `Forbidden` below project admin.
    pub async fn audit(&self, actor: &Actor, filter: AuditFilter, page: Page) -> Result<Listing<AuditEntry>, Refusal> {
        needs(actor, Role::ProjectAdmin)?;
        let project = match actor.role {
            Role::CloudAdmin => filter.project,
            _ => Some(actor.project),
        };
        let page = Page {
            limit: page.limit.clamp(1, Page::LIMIT_MAX),
            ..page
        };
        let read = self.0.storage.audit(AuditFilter { project, ..filter }, page).await;
        read.map_err(|error| read_only(&error.story()))
    }

    /// Waits until an actor no longer has the right with which it came: what that opened has to end.
    pub async fn right_ended(&self, actor: &Actor) {
        let mut rights = self.0.committed.rights();
        while self.0.committed.still_has(actor, self.now()) {
            if rights.changed().await.is_err() {
                return;
            }
        }
    }

    /// Writes something into the audit log that no command stands for.
    pub(crate) async fn note(&self, actor: &Actor, action: &'static str, target: String, refused: Option<&Refusal>) {
        self.write_note(actor, action, target, refused, true).await;
    }

    async fn write_note(
        &self,
        actor: &Actor,
        action: &'static str,
        target: String,
        refused: Option<&Refusal>,
        in_project: bool,
    ) {
        let note = AuditNote {
            action,
            target,
            refused: refused.map(|refusal| refusal.code),
            in_project,
        };
        let written = self
            .submit(actor.clone(), Command::Note(note), SubmitOptions::default())
            .await;
        // A full disk must not keep people from a console with which they may help.
        if let Err(refusal) = written {
            tracing::warn!(%refusal, action, subject = actor.subject, "not written into the audit log");
        }
    }
}

fn new_token() -> Result<ApiToken, Refusal> {
    ApiToken::generate().map_err(|error| Refusal::new(Code::Overloaded, error.to_string()).hint("try again"))
}
