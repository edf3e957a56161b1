//! API tokens: what people and scripts present to the controller.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::random::{RandomUnavailable, random, same_secret};
use crate::secret_file::{self, ReadSecretError, WriteSecretError};

const PREFIX: &str = "gw1_";
const TOKEN_BYTES: usize = 32;
const FILE_BYTES_MAX: u64 = 1024;

/// Why there is no API token.
#[derive(Debug, thiserror::Error)]
pub enum ApiTokenError {
    /// Not `gw1_` and 43 characters of base64url.
    #[error("an API token is {PREFIX} and 43 characters; this one is of another form or cut short")]
    Form,
    /// The token file cannot be read, or others can read it.
    #[error("the token file cannot be used")]
    Read(#[from] ReadSecretError),
    /// The token file cannot be written.
    #[error("the token was not saved")]
    Write(#[from] WriteSecretError),
}

/// A bearer token: `gw1_` and base64url of 256 random bits.
#[derive(Clone)]
pub struct ApiToken([u8; TOKEN_BYTES]);

impl ApiToken {
    /// A new token.
    pub fn generate() -> Result<Self, RandomUnavailable> {
        Ok(Self(random()?))
    }

    /// The text to present. It is a secret.
    #[must_use]
    pub fn reveal(&self) -> String {
        format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(self.0))
    }

    /// What the controller keeps.
    #[must_use]
    pub fn digest(&self) -> ApiTokenDigest {
        ApiTokenDigest(Sha256::digest(self.0).into())
    }

    /// Writes it to a new file (0600), as the controller does once for the first administrator.
    pub fn create_file(&self, path: &Path) -> Result<(), ApiTokenError> {
        Ok(secret_file::create(path, format!("{}\n", self.reveal()).as_bytes())?)
    }

    /// Reads a token file; refuses one that others can read.
    pub fn read_file(path: &Path) -> Result<Self, ApiTokenError> {
        let bytes = secret_file::read(path, FILE_BYTES_MAX)?;
        std::str::from_utf8(&bytes)
            .map_err(|_| ApiTokenError::Form)?
            .trim()
            .parse()
    }
}

impl FromStr for ApiToken {
    type Err = ApiTokenError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let body = text.strip_prefix(PREFIX).ok_or(ApiTokenError::Form)?;
        let mut bytes = [0u8; TOKEN_BYTES];
        match URL_SAFE_NO_PAD.decode_slice(body, &mut bytes) {
            Ok(TOKEN_BYTES) => Ok(Self(bytes)),
            _ => Err(ApiTokenError::Form),
        }
    }
}

impl fmt::Debug for ApiToken {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "ApiToken(secret)")
    }
}

/// SHA-256 of a token. A slow password hash would add nothing: 256 random bits cannot be guessed however fast the hash is,
/// and every request would pay for it.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct ApiTokenDigest(pub [u8; 32]);

impl ApiTokenDigest {
    /// Whether `token` is the one that this was made of; constant time.
    #[must_use]
    pub fn matches(&self, token: &ApiToken) -> bool {
        same_secret(&self.0, &token.digest().0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn a_token_matches_its_own_digest_only() {
        let (one, two) = (ApiToken::generate().unwrap(), ApiToken::generate().unwrap());
        let back: ApiToken = one.reveal().parse().unwrap();
        assert!(one.digest().matches(&back));
        assert!(!one.digest().matches(&two));
        assert_eq!(format!("{one:?}"), "ApiToken(secret)");
    }

    #[test]
    fn other_texts_are_refused() {
        let text = ApiToken::generate().unwrap().reveal();
        assert_eq!(text.len(), 47);
        for bad in [
            "",
            "gw1_",
            &text[1..],
            &text[..46],
            &format!("{text}A"),
            &format!("{text}="),
            "gw1_\u{202e}",
        ] {
            assert!(matches!(bad.parse::<ApiToken>(), Err(ApiTokenError::Form)), "{bad}");
        }
    }

    #[test]
    fn the_first_token_file_is_private_and_refused_when_others_can_read_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("admin.token");
        let token = ApiToken::generate().unwrap();
        token.create_file(&path).unwrap();
        assert!(matches!(token.create_file(&path), Err(ApiTokenError::Write(_))));
        assert!(token.digest().matches(&ApiToken::read_file(&path).unwrap()));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(ApiToken::read_file(&path), Err(ApiTokenError::Read(_))));
    }
}
