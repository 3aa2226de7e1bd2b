from dataclasses import dataclass
@dataclass(frozen=True)
class Config: pass
