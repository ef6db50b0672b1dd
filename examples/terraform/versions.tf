# Terragrunt's generate blocks replace this file if they write a versions.tf: keep the limits there.
terraform {
  required_version = ">= 1.5"

  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = ">= 5.77, < 7.0"
    }
  }
}
